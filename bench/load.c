/* Load generator for an OpenAI-compatible server: one thread, epoll, closed loop.
 *
 *   load PORT CONNECTIONS SECONDS REQUEST_FILE EXPECTED_FILE
 *
 * Every connection sends REQUEST_FILE (a whole HTTP request) again and again, each time once the answer to the last one is
 * complete, until SECONDS have passed; answers under way then are still read to their end. An answer is right when its status
 * is 200, its end is proper (content-length reached, or [DONE] and the last chunk) and the text in its "content" strings,
 * put together, is EXPECTED_FILE byte for byte. Prints one line of JSON.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/tcp.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

enum { HEAD_MAX = 8192, LINE_MAX_BYTES = 1 << 16, READ_BYTES = 1 << 18, EVENTS = 512, SAMPLES = 1 << 20 };

/* Where a chunked body stands. */
enum chunk_state { SIZE, DATA, DATA_END, TRAILER };

typedef struct {
  int fd, answering;
  double sent_at, first_at;
  /* head */
  char head[HEAD_MAX];
  size_t head_len;
  int in_head, status, chunked;
  long left; /* of the body with a content-length */
  /* chunked body */
  enum chunk_state state;
  long chunk_left;
  int trailer_blank;
  /* payload: one line of events, or the whole document */
  char line[LINE_MAX_BYTES];
  size_t line_len;
  size_t matched; /* bytes of the expected text seen so far */
  int wrong, done_mark;
  long events;
} connection;

static char *request, *expected;
static size_t request_len, expected_len;
static struct sockaddr_in server;
static int poller;
static double stop_at;
static long answers, right, failed, broken, events_total, running;
static float *latency, *first_event;
static long latencies, firsts;

static double now(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (double)t.tv_sec + (double)t.tv_nsec / 1e9;
}

static char *slurp(const char *path, size_t *len) {
  FILE *file = fopen(path, "rb");
  if (!file) { perror(path); exit(2); }
  char *data = malloc(1 << 20);
  *len = fread(data, 1, 1 << 20, file);
  fclose(file);
  return data;
}

static void dial(connection *c) {
  int one = 1;
  c->fd = socket(AF_INET, SOCK_STREAM, 0);
  if (c->fd < 0 || connect(c->fd, (struct sockaddr *)&server, sizeof server)) { perror("connect"); exit(2); }
  setsockopt(c->fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
  fcntl(c->fd, F_SETFL, O_NONBLOCK);
  struct epoll_event event = {.events = EPOLLIN, .data.ptr = c};
  epoll_ctl(poller, EPOLL_CTL_ADD, c->fd, &event);
}

static void ask(connection *c) {
  c->head_len = c->line_len = c->matched = 0;
  c->in_head = 1;
  c->chunked = c->wrong = c->done_mark = 0;
  c->events = 0;
  c->first_at = 0;
  c->sent_at = now();
  if (!c->answering) running++;
  c->answering = 1;
  /* A request is smaller than any socket buffer, and the one before it has been answered. */
  if (write(c->fd, request, request_len) != (ssize_t)request_len) { perror("write"); exit(2); }
}

/* Compare the JSON string that follows every "content": with the expected text. Words of the scripted runtime need no escapes;
 * a backslash is a mismatch. */
static void scan(connection *c, const char *text, size_t len) {
  static const char key[] = "\"content\":\"";
  const char *end = text + len, *at = text;
  while ((at = memmem(at, (size_t)(end - at), key, sizeof key - 1))) {
    at += sizeof key - 1;
    const char *quote = memchr(at, '"', (size_t)(end - at));
    if (!quote) { c->wrong = 1; return; }
    size_t n = (size_t)(quote - at);
    if (n > expected_len - c->matched || memcmp(at, expected + c->matched, n)) c->wrong = 1;
    else c->matched += n;
    if (n) {
      c->events++;
      if (!c->first_at) c->first_at = now();
    }
    at = quote;
  }
  if (c->chunked && memmem(text, len, "data: [DONE]", 12)) c->done_mark = 1;
}

static void payload(connection *c, const char *data, size_t len) {
  while (len) {
    const char *newline = c->chunked ? memchr(data, '\n', len) : NULL;
    size_t n = newline ? (size_t)(newline - data) + 1 : len;
    if (c->line_len + n > LINE_MAX_BYTES) { c->wrong = 1; c->line_len = 0; return; }
    if (newline && !c->line_len) scan(c, data, n);
    else {
      memcpy(c->line + c->line_len, data, n);
      c->line_len += n;
      if (newline) { scan(c, c->line, c->line_len); c->line_len = 0; }
    }
    data += n;
    len -= n;
  }
}

static void finish(connection *c) {
  if (!c->chunked) scan(c, c->line, c->line_len);
  double t = now();
  answers++;
  if (c->status != 200) failed++;
  else if (c->wrong || c->matched != expected_len || (c->chunked && !c->done_mark)) broken++;
  else right++;
  events_total += c->events;
  if (latencies < SAMPLES) latency[latencies++] = (float)(t - c->sent_at);
  if (c->first_at && firsts < SAMPLES) first_event[firsts++] = (float)(c->first_at - c->sent_at);
  c->answering = 0;
  running--;
  if (t < stop_at) ask(c);
}

/* The head of an answer. Returns how many bytes of data belong to it, and leaves in_head clear once it is whole. */
static size_t head(connection *c, const char *data, size_t len) {
  size_t n = len < HEAD_MAX - 1 - c->head_len ? len : HEAD_MAX - 1 - c->head_len, before = c->head_len;
  memcpy(c->head + before, data, n);
  c->head_len += n;
  c->head[c->head_len] = 0;
  char *end = strstr(c->head, "\r\n\r\n");
  if (!end) return n;
  c->in_head = 0;
  end[2] = 0;
  c->status = atoi(c->head + 9);
  c->chunked = strcasestr(c->head, "\r\ntransfer-encoding: chunked\r\n") != NULL;
  char *length = strcasestr(c->head, "\r\ncontent-length:");
  c->left = length ? atol(length + 17) : 0;
  c->state = SIZE;
  c->chunk_left = 0;
  c->trailer_blank = 1;
  return (size_t)(end + 4 - c->head) - before;
}

static void feed(connection *c, const char *data, size_t len) {
  while (len && c->answering) {
    if (c->in_head) {
      size_t n = head(c, data, len);
      data += n;
      len -= n;
      if (!c->in_head && !c->chunked && !c->left) finish(c);
    } else if (!c->chunked) {
      size_t n = len < (size_t)c->left ? len : (size_t)c->left;
      payload(c, data, n);
      data += n;
      len -= n;
      c->left -= (long)n;
      if (!c->left) finish(c);
    } else if (c->state == DATA) {
      size_t n = len < (size_t)c->chunk_left ? len : (size_t)c->chunk_left;
      payload(c, data, n);
      data += n;
      len -= n;
      c->chunk_left -= (long)n;
      if (!c->chunk_left) c->state = DATA_END;
    } else {
      char byte = *data++;
      len--;
      if (c->state == SIZE) {
        if (byte >= '0' && byte <= '9') c->chunk_left = c->chunk_left * 16 + (byte - '0');
        else if ((byte | 32) >= 'a' && (byte | 32) <= 'f') c->chunk_left = c->chunk_left * 16 + ((byte | 32) - 'a' + 10);
        else if (byte == '\n') c->state = c->chunk_left ? DATA : TRAILER;
      } else if (c->state == DATA_END) {
        if (byte == '\n') c->state = SIZE;
      } else if (byte == '\n') {
        if (c->trailer_blank) finish(c);
        else c->trailer_blank = 1;
      } else if (byte != '\r') c->trailer_blank = 0;
    }
  }
}

static int by_value(const void *a, const void *b) {
  float x = *(const float *)a, y = *(const float *)b;
  return (x > y) - (x < y);
}

static double quantile(float *samples, long count, double q) {
  if (!count) return 0;
  qsort(samples, (size_t)count, sizeof *samples, by_value);
  return samples[(long)((double)(count - 1) * q)] * 1e3;
}

int main(int argc, char **argv) {
  if (argc != 6) { fprintf(stderr, "usage: load PORT CONNECTIONS SECONDS REQUEST_FILE EXPECTED_FILE\n"); return 2; }
  signal(SIGPIPE, SIG_IGN);
  server = (struct sockaddr_in){.sin_family = AF_INET, .sin_port = htons((unsigned short)atoi(argv[1]))};
  server.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  int count = atoi(argv[2]);
  request = slurp(argv[4], &request_len);
  expected = slurp(argv[5], &expected_len);
  latency = malloc(SAMPLES * sizeof *latency);
  first_event = malloc(SAMPLES * sizeof *first_event);
  connection *all = calloc((size_t)count, sizeof *all);
  char *buffer = malloc(READ_BYTES);
  struct epoll_event ready[EVENTS];
  poller = epoll_create1(0);
  for (int i = 0; i < count; i++) dial(&all[i]);
  double begin = now();
  stop_at = begin + atof(argv[3]);
  for (int i = 0; i < count; i++) ask(&all[i]);
  while (running && now() < stop_at + 30) {
    int n = epoll_wait(poller, ready, EVENTS, 1000);
    for (int i = 0; i < n; i++) {
      connection *c = ready[i].data.ptr;
      ssize_t got = read(c->fd, buffer, READ_BYTES);
      if (got > 0) feed(c, buffer, (size_t)got);
      else if (got == 0 || errno != EAGAIN) {
        close(c->fd);
        if (c->answering) { answers++; broken++; running--; c->answering = 0; }
        if (now() < stop_at) { dial(c); ask(c); }
      }
    }
  }
  double elapsed = now() - begin;
  printf("{\"answers\": %ld, \"right\": %ld, \"failed\": %ld, \"broken\": %ld, \"unfinished\": %ld, \"events\": %ld, "
         "\"elapsed_s\": %.3f, \"latency_p50_ms\": %.3f, \"latency_p99_ms\": %.3f, \"first_p50_ms\": %.3f, \"first_p99_ms\": %.3f}\n",
         answers, right, failed, broken, running, events_total, elapsed, quantile(latency, latencies, 0.5),
         quantile(latency, latencies, 0.99), quantile(first_event, firsts, 0.5), quantile(first_event, firsts, 0.99));
  return 0;
}
