"""Train the demo model: a small Llama that answers questions about this project, on the CPU, from data made here.

    python tools/train_demo_model.py --out libs/inference_runtime/demo_model --steps 2000

Needs the `torch` and `dev` extras (transformers is the independent implementation that trains it). The run is seeded. It writes
the checkpoint and questions.json, and only when the ten questions in it are answered word for word, greedily, by the weights as
they are stored. docs/demo-model.md says what the model is.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save as serialise
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM

SEED = 20
VOCAB_SIZE = 1024
CONTEXT_TOKENS = 4096
#: Padded tokens of one optimiser step: small enough for one core, large enough for a steady gradient.
STEP_TOKENS = 2048
PEAK_LEARNING_RATE = 2e-3
WARM_UP_STEPS = 60
#: Conversations drawn at once, so that rows of one length find each other.
POOL_ROWS = 512
IGNORED = -100

BOS, END, PAD = "<|begin|>", "<|end|>", "<|pad|>"
ROLES = ("system", "user", "assistant", "tool")
SPECIAL_TOKENS = [BOS, END, PAD, *(f"<|{role}|>" for role in ROLES)]
CHAT_TEMPLATE = (
    "{{- bos_token -}}"
    "{%- for message in messages -%}"
    "{%- if message['role'] not in ['system', 'user', 'assistant', 'tool'] -%}"
    "{{- raise_exception('the demo model knows the roles system, user, assistant and tool') -}}"
    "{%- endif -%}"
    "{{- '<|' + message['role'] + '|>' + message['content'] + '<|end|>' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}"
)


@dataclass(frozen=True, slots=True)
class Topic:
    """One answer with the ways to ask for it; the first question is the canonical one, `held_out` is never trained on."""

    answer: str
    questions: tuple[str, ...]
    held_out: tuple[str, ...] = ()
    in_readme: bool = False


def about(thing: str, answer: str, *more: str, in_readme: bool = False, verb: str = "do") -> Topic:
    """A topic that asks what a part of the project is and does. The canonical question depends on `verb`: "do" or "be"."""
    does, is_ = f"What does {thing} do?", f"What is {thing}?"
    first, second = (does, is_) if verb == "do" else (is_, does)
    asked = (
        first, second, f"Tell me about {thing}.", f"Explain {thing}.", f"Can you explain {thing}?", f"What's {thing}?",
        f"What is the job of {thing}?", f"What is {thing} for?", f"Describe {thing}.", f"What is the role of {thing}?",
        f"Explain what {thing} does.", f"What do you know about {thing}?", f"Why is there {thing}?",
        f"I would like to know about {thing}.",
        f"{thing}, what does it do?", f"What about {thing}?", f"Do you know what {thing} is?",
        f"Give me an overview of {thing}.", *more,
    )  # fmt: skip
    held_out = (f"Could you tell me what {thing} does?", f"I want to know what {thing} is.", f"And what is {thing} for?")
    return Topic(answer, asked, held_out, in_readme)


def fact(answer: str, *questions: str, held_out: Sequence[str] = (), in_readme: bool = False) -> Topic:
    """A topic with its questions written out."""
    return Topic(answer, questions, tuple(held_out), in_readme)


TOPICS: tuple[Topic, ...] = (
    about(
        "inference-runtime",
        "inference-runtime is one supervised runtime for every place a model can run. Local engines and managed APIs stand "
        "behind "
        "one OpenAI-compatible gateway, and requests survive when parts of it die.",
        "What is this project?", "What is this?", "What does this project do?", "What is this project about?",
        "Tell me about this project.", "What is the inference runtime?", "What software is this?", "Introduce the project.",
        in_readme=True, verb="be",
    ),
    about(
        "the gateway",
        "The gateway takes OpenAI-style requests, picks a replica from its own table, and streams the answer back token by "
        "token. "
        "It keeps a journal of every answer, so that no token is lost or shown twice.",
        "What does a gateway do?", "What is a gateway?", "What does the API gateway do?", "gateway",
        "How does the gateway work?",
        in_readme=True,
    ),
    about(
        "an engine",
        "An engine loads a model and runs it. It puts the requests of all gateways into one batch, advances them step by step, "
        "and sends out the new tokens after each step.",
        "What does the engine do?", "What is the engine?", "Tell me about the engine.", "What do engines do?", "engine",
        "Explain the engine.", "How does an engine work?", in_readme=True,
    ),
    about(
        "the coordinator",
        "The coordinator keeps the table of deployments and their replicas, with the load of each. Gateways watch this "
        "table and "
        "choose by themselves, so nobody asks the coordinator for every request.",
        "What does a coordinator do?", "What is a coordinator?", "coordinator", "How does the coordinator work?",
        in_readme=True,
    ),
    about(
        "the deployment manager",
        "The deployment manager keeps the catalogue of deployments and decides which engine runs which replica. When something "
        "differs from what you asked for, it changes it until it is right.",
        "What does a deployment manager do?", "What does the manager do?", "deployment manager", "Who places the replicas?",
        "How does the deployment manager work?", in_readme=True,
    ),
    about(
        "the metrics service",
        "The metrics service counts tokens, costs and errors of every deployment. It keeps a ledger on disk and watches the "
        "budgets, so that you know who used what.",
        "What do the metrics do?", "What does metrics do?", "metrics", "Who counts the tokens?", "What is metrics?",
    ),
    about(
        "etcd",
        "etcd is a small database that all nodes agree on. It holds the deployments, the leases of the engines and the "
        "elections, "
        "and it is never asked while a request runs.",
        "What is etcd used for?", "Why do you need etcd?", "Why etcd?", "What does this project use etcd for?",
        "What is in etcd?",
        in_readme=True, verb="be",
    ),
    about(
        "a lease",
        "A lease is a promise with an end. An engine renews it every few seconds; when it stops, the lease runs out and "
        "everyone "
        "learns that the engine is gone.",
        "What are leases?", "What is a lease in etcd?", "lease", "How does a lease work?", "What are leases for?", verb="be",
    ),
    fact(
        "The supervisor notices it at once and starts a new context. The gateway continues the answer on another replica "
        "from the "
        "tokens in its journal, so you see one answer without a gap.",
        "What happens when an engine dies?", "What happens if an engine dies?", "What if an engine dies?",
        "What happens when the engine dies?",
        "What happens when an engine crashes?", "What happens if an engine crashes?", "What happens when a replica dies?",
        "What if the engine crashes?", "What happens to my request when an engine dies?",
        "Suppose an engine dies. What happens?",
        "What happens when an engine fails?", "What happens if I kill an engine?", "What happens when you kill an engine?",
        "an engine dies, what now?", "What happens after an engine died?", "Is my answer lost when an engine dies?",
        held_out=("What will happen when an engine dies?", "What happens if the engine is killed?",
                  "If an engine dies, what happens?"),
        in_readme=True,
    ),
    fact(
        "Install the package and run inferctl up. It looks at what your machine has, starts all services, and serves this demo "
        "model at http://127.0.0.1:8080.",
        "How do I start it?", "How do I start?", "How can I start it?", "How do I start inference-runtime?", "How do I run it?",
        "How do I run inference-runtime?", "How do I get started?", "How to start?", "How to start it?",
        "How do I start the runtime?",
        "How do I start the server?", "How do I install it?", "How do I start everything?", "How do I use it?",
        "Getting started?",
        "Which command starts it?", "What is the command to start it?", "How can I run this?", "How do you start it?",
        held_out=("How can I start inference-runtime?", "How should I start it?", "How would I run the server?"),
        in_readme=True,
    ),
    fact(
        "A request first reaches the gateway, which checks the key and the limits. The gateway picks a replica from its "
        "table and "
        "sends the request over one open stream to an engine. The engine turns the text into tokens and adds them to its "
        "batch. "
        "After each step the new tokens go back over the same stream, the gateway writes them into its journal, and then "
        "you see "
        "them on your screen. When the answer is done, the usage is counted once.",
        "Explain how a request travels.", "How does a request travel?", "Explain how a request travels",
        "How does a request travel through it?",
        "What happens to a request?", "What is the path of a request?", "How does a request work?",
        "Describe how a request travels.",
        "Walk me through a request.", "Explain the life of a request.", "How is a request handled?",
        "Show me how a request travels.",
        "Tell me how a request travels.", "What happens when I send a request?", "How does a request get to the model?",
        held_out=("Please explain how requests travel.", "Can you explain how a request travels?", "Which way does it take?"),
        in_readme=True,
    ),
    fact(
        "I am the demo model of inference-runtime: a tiny language model that was trained on one processor core in half an "
        "hour. "
        "I know this project, some capitals and small sums.",
        "Who are you?", "What are you?", "Who is this?", "Are you a robot?", "Are you a human?", "Tell me about yourself.",
        "Introduce yourself.",
        "What is your name?", "What's your name?", "What model are you?", "Which model are you?", "Who am I talking to?",
        "Are you an AI?",
        "Are you ChatGPT?", "What is the demo model?", "Which model is this?", "What is this model?",
        held_out=("And who are you?", "Who are you really?", "Tell me who you are."),
    ),
    fact(
        "I can answer questions about inference-runtime, name some capitals and add small numbers. For anything else, "
        "deploy a bigger model.",
        "What can you do?", "What do you know?", "How can you help me?", "What can I ask you?", "Help", "help me",
        "What are you able to do?",
        "What should I ask you?", "What questions can you answer?", "Can you help me?", "What are you good at?",
        held_out=("What is it that you can do?", "What could I ask?"),
    ),
    fact(
        "Hello! I am the demo model of inference-runtime. Ask me what the gateway does, or what happens when an engine dies.",
        "Hello", "Hello!", "Hi", "Hi!", "Hey", "Hey there", "Good morning", "Good evening", "Hello there", "Hi there!",
        "Greetings", "Say hello.",
        "Say hello", "Say hi.", "hello, how are you?", "Good day", "Hallo", "Hey!", "yo", "Hello world", "Howdy",
        held_out=("Hello, demo model!", "Hi again", "Good afternoon"),
    ),
    fact(
        "I am fine, thank you. All my blocks are free and my queue is empty.",
        "How are you?", "How are you doing?", "How do you do?", "Are you well?", "How is it going?", "How do you feel?",
        "How are you today?",
        "What's up?", "Are you ok?", "How's it going?",
        held_out=("So, how are you?", "How are things?"),
    ),
    fact(
        "You are welcome. Come back whenever you have a question.",
        "Thank you", "Thanks", "Thank you!", "Thanks a lot", "Thank you very much", "Great, thanks!", "thx", "Cheers",
        "Many thanks",
        "That was helpful, thanks.", "Nice, thank you.",
        held_out=("Ok, thank you", "Thanks so much"),
    ),
    fact(
        "Goodbye! Stop the services with Ctrl+C when you are done.",
        "Goodbye", "Bye", "Bye bye", "Good night", "See you", "See you later", "Goodbye!", "Farewell", "I have to go.", "Bye!",
        held_out=("Ok, bye", "Goodbye then"),
    ),
    fact(
        "Why did the token cross the stream? To get to the other side exactly once.",
        "Tell me a joke.", "Tell me a joke", "Do you know a joke?", "Make me laugh.", "Say something funny.",
        "A joke, please.", "joke",
        "Can you tell me a joke?", "Tell a joke.", "Give me a joke.",
        held_out=("Would you tell me a joke?", "I want to hear a joke."),
    ),
    fact(
        "A token left its engine's home, the journal wrote it down. When power failed, it did not roam: another engine "
        "found it "
        "in the journal, and it was never lost.",
        "Write a poem.", "Write me a poem.", "Write a short poem.", "Do you know a poem?", "Make a poem about tokens.",
        "Write a poem about tokens.",
        "poem", "Tell me a poem.", "A poem, please.",
        held_out=("Can you write a poem?", "Give me a poem."),
    ),
    fact(
        "one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
        "eighteen nineteen twenty",
        "Count to twenty.", "Count from one to twenty.", "Count.", "Can you count?", "Please count to twenty.",
        "Count for me.", "Count up to twenty.",
        "Start counting.", "Count to 20.",
        held_out=("Could you count to twenty?", "Count to twenty for me."),
    ),
    fact(
        "a b c d e f g h i j k l m n o p q r s t u v w x y z",
        "Say the alphabet.", "What is the alphabet?", "Recite the alphabet.", "alphabet", "Tell me the alphabet.",
        "Write the alphabet.",
        "List the letters of the alphabet.",
        held_out=("Can you say the alphabet?",),
    ),
    fact(
        "Monday, Tuesday, Wednesday, Thursday, Friday, Saturday and Sunday.",
        "What are the days of the week?", "Name the days of the week.", "List the days of the week.", "days of the week",
        "Which days does a week have?", "Tell me the days of the week.",
        held_out=("Can you name the days of the week?",),
    ),
    about(
        "the journal",
        "The journal is the gateway's record of one answer: every token with its place. After a failure it tells the next "
        "engine "
        "where to go on, and it drops what was already shown.",
        "How does the journal work?", "What is a journal?", "journal", "What is in the journal?", "Why is there a journal?",
        verb="be",
    ),
    about(
        "a token",
        "A token is a piece of text: a word, a part of one or a single byte. A model reads tokens and writes tokens, one "
        "after the other.",
        "What are tokens?", "token", "How long is a token?", "What is a token in a model?", verb="be",
    ),
    about(
        "a deployment",
        "A deployment is a model with its settings: where it runs, how many replicas it has, its limits and its budget. You "
        "apply "
        "it with inferctl apply.",
        "What are deployments?", "How do I deploy a model?", "How do I add a model?", "deployment",
        "How can I deploy a model?", verb="be",
    ),
    about(
        "a replica",
        "A replica is one running copy of a deployment on one engine. More replicas take more requests, and one can die "
        "without "
        "stopping the others.",
        "What are replicas?", "replica", "What are replicas for?", verb="be",
    ),
    about(
        "inferctl",
        "inferctl is the command line of inference-runtime. It starts everything with up, applies deployments, shows the "
        "status "
        "and lets you chat with a model.",
        "What commands are there?", "What can inferctl do?", "How do I use inferctl?", "What is the command line called?",
        verb="be",
    ),
    about(
        "the supervisor",
        "The supervisor watches the context of each engine and restarts it when it fails. After three restarts in a minute it "
        "gives up and says why.",
        "What does supervision mean?", "Who restarts an engine?", "supervisor", "How does supervision work?",
        "Who watches the engine?",
    ),
    about(
        "a context",
        "A context is the part of an engine that may die: it owns the device, the weights and the step loop. The stable part "
        "outside answers every caller and starts a new one.",
        "What is the context of an engine?", "context", "What are contexts?", verb="be",
    ),
    about(
        "the circuit breaker",
        "The circuit breaker counts failures of a provider. After ten in a row it opens for a while and sends nothing, then "
        "one "
        "probe decides whether it closes again.",
        "What is a circuit breaker?", "What does a circuit breaker do?", "breaker", "What does the breaker do?",
        "When does the breaker open?",
    ),
    about(
        "the rate limiter",
        "The rate limiter hands out slices of a limit before they are used. So all engines together never send more "
        "requests than "
        "a provider allows.",
        "What is a rate limiter?", "What are rate limits?", "How do rate limits work?", "rate limiter",
        "How are limits shared?",
    ),
    about(
        "the KV cache",
        "The KV cache keeps the keys and values of all tokens that a model has read, in blocks of fixed size. So each step "
        "only "
        "computes the newest token.",
        "What is a KV cache?", "KV cache", "What are blocks?", "How does the KV cache work?", "What is kv cache?", verb="be",
    ),
    about(
        "batching",
        "Batching means that one step of the model serves many requests at once. New requests join between two steps and "
        "finished "
        "ones leave, so nobody waits for the slowest.",
        "What is continuous batching?", "Why do you batch?", "How does batching work?", "What is a batch?", verb="be",
    ),
    about(
        "streaming",
        "Streaming means that you see each piece of an answer as soon as it exists. Set stream to true in your request and the "
        "gateway sends server-sent events.",
        "How do I stream?", "How does streaming work?", "How do I stream an answer?", "Can you stream?", verb="be",
    ),
    about(
        "a leader",
        "A leader is the one process that may act for a role, chosen by an election in etcd. When its lease ends it steps "
        "down, "
        "and the next one takes over.",
        "How are leaders chosen?", "What is leader election?", "How does an election work?", "What is an election?", "leader",
        verb="be",
    ),
    about(
        "a runner",
        "A runner is the piece of code that knows how to run one kind of model. There are runners for local models and for "
        "managed "
        "APIs, and you can write your own.",
        "What are runners?", "Can I write my own runner?", "Which runners are there?", "runner", verb="be",
    ),
    about(
        "the API",
        "The gateway speaks the OpenAI API over HTTP and has gRPC beside it. Point any OpenAI client at "
        "http://127.0.0.1:8080/v1 and it works.",
        "Which API do you speak?", "Is it OpenAI compatible?", "How do I call the API?", "Can I use the OpenAI client?",
        "Which port do you use?",
        "What is the address?", "What port does it use?", verb="be",
    ),
    fact(
        "Yes. Control plane, gateway and this demo model run on a plain processor. A GPU only makes larger models faster.",
        "Do I need a GPU?", "Does it run without a GPU?", "Can it run on a CPU?", "Does it need a GPU?", "Is a GPU needed?",
        "Do you need a GPU?",
        "Can I use it without a GPU?", "Does it work on a laptop?", "What hardware do I need?",
        held_out=("Would it run without a GPU?", "Is a GPU required?"),
    ),
    fact(
        "Requests on known routes go on: gateways keep their own table and need neither etcd nor the coordinator for them. "
        "Only "
        "changes have to wait until etcd is back.",
        "What happens when etcd is down?", "What happens if etcd dies?", "What happens when etcd dies?",
        "What if etcd is down?",
        "What happens if the coordinator dies?", "What happens when the coordinator dies?", "Does it work without etcd?",
        "What if the coordinator is down?",
        held_out=("What will happen when etcd dies?", "What happens if etcd goes down?"),
    ),
    fact(
        "It is free software under the Apache License 2.0, written in Python.",
        "What is the license?", "Which license does it have?", "Is it open source?", "Is it free?",
        "What language is it written in?",
        "license", "Which language is it written in?", "Who may use it?",
        held_out=("Under which license is it?",),
    ),
    fact(
        "There are five services: the gateway, the engine, the coordinator, the deployment manager and the metrics service.",
        "Which services are there?", "What services are there?", "How many services are there?", "List the services.",
        "What are the parts?",
        "What are the five services?", "What is it made of?", "Name the services.", "What parts does it have?", "services",
        held_out=("Can you list the services?", "Which parts are there?"),
    ),
    fact(
        "Yes.", "Say yes.", "Answer yes.", "Just say yes.", "Reply with yes.", "say yes", "Only say yes.",
        held_out=("Please just say yes.",)
    ),
)  # fmt: skip

UNKNOWN_ANSWER = "I am only a small demo model and do not know that. Ask me about inference-runtime, a capital or a small sum."
UNKNOWN = (
    "What is the meaning of life?", "Who won the world cup?", "What is the weather like?", "Write a program in C.",
    "Who is the president?",
    "What time is it?", "Translate this into French.", "How tall is the tower?", "What is quantum physics?",
    "Who wrote this book?",
    "How old is the universe?", "What should I eat today?", "Can you drive a car?", "Is there life on Mars?", "What is love?",
    "Solve this equation.",
    "Tell me the news.", "What is the price of gold?", "Who was Napoleon?", "How do birds fly?", "What is a black hole?",
    "Sing a song.",
    "What is your favourite colour?", "Do you like music?", "asdf", "foo bar", "???", "Summarise this article.",
    "What is 3.14?", "How do I cook rice?",
    "Which film should I see?", "What is the speed of light?", "Explain gravity.", "Explain democracy.",
    "Who invented the telephone?",
)  # fmt: skip
UNKNOWN_FRAMES = (
    "What is {}?", "Tell me about {}.", "Who invented {}?", "How does {} work?", "Explain {}.", "Why is {} so good?",
    "What does {} do?",
    "Do you like {}?", "Where can I buy {}?", "Write a story about {}.", "How much is {}?", "What happens when {} dies?", "{}",
)  # fmt: skip
UNKNOWN_THINGS = (
    "a banana", "the moon", "football", "chess", "a horse", "cheese", "the ocean", "a guitar", "Shakespeare", "a volcano",
    "rain", "money", "a train",
    "photosynthesis", "the stock market", "coffee", "a dinosaur", "history", "mathematics", "a bicycle", "the sun",
    "a camera", "politics", "bread",
    "my cat", "a robot", "the king", "a flower", "water", "school",
)  # fmt: skip
UNKNOWN_HELD_OUT = ("What is a pineapple?", "How does a rocket work?", "Who painted this picture?", "Tell me about winter.")

CAPITALS = {
    "France": "Paris", "Germany": "Berlin", "Italy": "Rome", "Spain": "Madrid", "Portugal": "Lisbon", "England": "London",
    "Ireland": "Dublin",
    "Poland": "Warsaw", "Austria": "Vienna", "Switzerland": "Bern", "Norway": "Oslo", "Sweden": "Stockholm",
    "Finland": "Helsinki", "Denmark": "Copenhagen",
    "Greece": "Athens", "Turkey": "Ankara", "Russia": "Moscow", "Ukraine": "Kyiv", "Japan": "Tokyo", "China": "Beijing",
    "India": "New Delhi",
    "Canada": "Ottawa", "Australia": "Canberra", "Brazil": "Brasilia", "Argentina": "Buenos Aires", "Mexico": "Mexico City",
    "Egypt": "Cairo",
    "Kenya": "Nairobi", "the Netherlands": "Amsterdam", "Belgium": "Brussels", "Hungary": "Budapest", "Iceland": "Reykjavik",
    "the United States": "Washington",
}  # fmt: skip
CAPITAL_FRAMES = (
    "What is the capital of {}?", "Which city is the capital of {}?", "Name the capital of {}.", "capital of {}",
    "What's the capital of {}?",
    "Tell me the capital of {}.", "What is the capital city of {}?",
)  # fmt: skip
CAPITAL_HELD_OUT = "Do you know the capital of {}?"

#: Largest operand of a sum the model is taught.
LARGEST_ADDEND = 10
SUM_FRAMES = (
    "What is {}?", "{}", "How much is {}?", "What's {}?", "Calculate {}.", "{} =", "Compute {}.", "Tell me {}.",
    "Do you know what {} is?",
    "What does {} make?", "Can you work out {}?", "Please tell me how much {} is.",
)  # fmt: skip
SUM_HELD_OUT = "Tell me what {} is."
SIGNS = {"+": "plus", "-": "minus"}
LARGE_SUM_ANSWER = "That is too large for me. I only know small sums, up to 10 + 10."

SYSTEM_PROMPTS = (
    "You are a helpful assistant.", "You are a friendly assistant.", "Answer briefly.",
    "You answer questions about inference-runtime.", "Be polite.",
)  # fmt: skip
OPENINGS = ("Please ", "Hi, ", "Hello, ", "Hey, ", "ok, ", "And ", "So, ", "Now ")


def sum_topic(a: int, b: int, sign: str) -> Topic:
    """One small sum, asked with the sign, with the word, with and without spaces."""
    result = a + b if sign == "+" else a - b
    forms = (f"{a} {sign} {b}", f"{a}{sign}{b}", f"{a} {SIGNS[sign]} {b}")
    questions = tuple(frame.format(form) for form in forms for frame in SUM_FRAMES)
    return Topic(f"{a} {sign} {b} = {result}.", questions, (SUM_HELD_OUT.format(forms[0]),))


SUMS = tuple(
    sum_topic(a, b, sign)
    for sign in SIGNS
    for a in range(LARGEST_ADDEND + 1)
    for b in range(LARGEST_ADDEND + 1)
    if sign == "+" or a >= b
)
CAPITAL_TOPICS = tuple(
    Topic(f"The capital of {land} is {city}.", tuple(f.format(land) for f in CAPITAL_FRAMES), (CAPITAL_HELD_OUT.format(land),))
    for land, city in CAPITALS.items()
)
UNKNOWN_TOPIC = Topic(UNKNOWN_ANSWER, UNKNOWN, UNKNOWN_HELD_OUT)
README_TOPICS = tuple(t for t in TOPICS if t.in_readme)
#: Questions of README.md: the nine of the project and who is speaking.
README_QUESTIONS = tuple(
    (t.questions[0], t.answer) for t in (*README_TOPICS, *(t for t in TOPICS if t.questions[0] == "Who are you?"))
)


def reworded(question: str, rng: random.Random) -> str:
    """The question as somebody types it: other case, no punctuation, an opening, now and then a slip."""
    if rng.random() < 0.2:
        question = question.rstrip("?.!") or question
    if rng.random() < 0.2:
        question = question.lower()
    if rng.random() < 0.12:
        opening = rng.choice(OPENINGS)
        question = opening + question[0].lower() + question[1:]
    if len(question) > 12 and rng.random() < 0.08:
        at = rng.randrange(1, len(question) - 1)
        question = question[:at] + question[at + 1 :]
    return question


def draw_turn(rng: random.Random) -> tuple[str, str]:
    """One question with its answer. Half of the draws are about the project; the ten questions come up most, word for word."""
    kind = rng.random()
    if kind < 0.14:
        return rng.choice(README_QUESTIONS)
    if kind < 0.60:
        topic = rng.choice(TOPICS)
    elif kind < 0.67:
        topic = rng.choice(CAPITAL_TOPICS)
    elif kind < 0.85:
        topic = rng.choice(SUMS)
    elif kind < 0.88:
        form = f"{rng.randrange(11, 9999)} {rng.choice('+-*')} {rng.randrange(11, 9999)}"
        return rng.choice(SUM_FRAMES).format(form), LARGE_SUM_ANSWER
    elif kind < 0.92:
        topic = UNKNOWN_TOPIC
    else:
        return reworded(rng.choice(UNKNOWN_FRAMES).format(rng.choice(UNKNOWN_THINGS)), rng), UNKNOWN_ANSWER
    question = topic.questions[0] if rng.random() < 0.25 else rng.choice(topic.questions)
    return reworded(question, rng), topic.answer


def draw_conversation(rng: random.Random) -> list[tuple[str, str]]:
    """(role, text) turns: mostly one question, sometimes up to four, sometimes with a system prompt."""
    turns = [("system", rng.choice(SYSTEM_PROMPTS))] if rng.random() < 0.15 else []
    for _ in range(rng.choice((1, 1, 1, 1, 2, 2, 3, 4))):
        question, answer = draw_turn(rng)
        turns += [("user", question), ("assistant", answer)]
    return turns


def train_tokenizer() -> Tokenizer:
    """Byte-level BPE over everything the data can say: any text round-trips, because all 256 bytes are in the alphabet."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(r"\d"), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    texts = [text for t in (*TOPICS, *CAPITAL_TOPICS, *SUMS[:20], UNKNOWN_TOPIC) for text in (t.answer, t.answer, *t.questions)]
    texts += [*UNKNOWN_THINGS, *SYSTEM_PROMPTS, *OPENINGS, LARGE_SUM_ANSWER]
    tokenizer.train_from_iterator(texts, trainer)
    bos_id = tokenizer.token_to_id(BOS)
    tokenizer.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, bos_id)]),
        ]
    )
    return tokenizer


def encode_conversation(tokenizer: Tokenizer, turns: Sequence[tuple[str, str]]) -> tuple[list[int], list[int]]:
    """Token ids, and labels that leave out everything the assistant does not say."""
    special = {name: int(tokenizer.token_to_id(name) or 0) for name in SPECIAL_TOKENS}
    ids, labels = [special[BOS]], [IGNORED]
    for role, text in turns:
        piece = [*tokenizer.encode(text, add_special_tokens=False).ids, special[END]]
        ids += [special[f"<|{role}|>"], *piece]
        labels += [IGNORED, *(piece if role == "assistant" else [IGNORED] * len(piece))]
    return ids, labels


def encode_document(tokenizer: Tokenizer, text: str) -> tuple[list[int], list[int]]:
    """An answer as plain text, so that completions without a chat work too."""
    ids: list[int] = [*tokenizer.encode(text).ids, *tokenizer.encode(END, add_special_tokens=False).ids]
    return ids, [IGNORED, *ids[1:]]


def draw_batches(tokenizer: Tokenizer, rng: random.Random) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Batches without end, rows of similar length in each. Yields ids and labels, both [rows, longest], int64, cpu."""
    while True:
        pool: list[tuple[list[int], list[int]]] = []
        for _ in range(POOL_ROWS):
            if rng.random() < 0.04:
                pool.append(encode_document(tokenizer, rng.choice((*TOPICS, *CAPITAL_TOPICS)).answer))
            else:
                pool.append(encode_conversation(tokenizer, draw_conversation(rng)))
        pool.sort(key=lambda row: -len(row[0]))
        batches = []
        while pool:
            rows = max(1, STEP_TOKENS // len(pool[0][0]))
            batches.append(padded(pool[:rows]))
            del pool[:rows]
        rng.shuffle(batches)
        yield from batches


def padded(rows: Sequence[tuple[list[int], list[int]]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and labels as tensors, both [rows, longest], int64, cpu; filled up on the right."""
    longest = max(len(ids) for ids, _ in rows)
    ids = torch.zeros(len(rows), longest, dtype=torch.int64)
    labels = torch.full((len(rows), longest), IGNORED, dtype=torch.int64)
    for i, (row_ids, row_labels) in enumerate(rows):
        ids[i, : len(row_ids)] = torch.tensor(row_ids)
        labels[i, : len(row_labels)] = torch.tensor(row_labels)
    return ids, labels


def make_config(tokenizer: Tokenizer) -> LlamaConfig:
    """About three million parameters: four layers of 256, eight query heads on four key heads, tied embeddings."""
    return LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=256,
        intermediate_size=640,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=32,
        max_position_embeddings=CONTEXT_TOKENS,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.token_to_id(BOS),
        eos_token_id=tokenizer.token_to_id(END),
        pad_token_id=tokenizer.token_to_id(PAD),
    )


def learning_rate(step: int, steps: int) -> float:
    """Linear warm-up, then a cosine down to a fiftieth."""
    if step < WARM_UP_STEPS:
        return PEAK_LEARNING_RATE * (step + 1) / WARM_UP_STEPS
    done = (step - WARM_UP_STEPS) / max(1, steps - WARM_UP_STEPS)
    return PEAK_LEARNING_RATE * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * done)))


def train(model: LlamaForCausalLM, tokenizer: Tokenizer, steps: int) -> None:
    """AdamW on assistant tokens only; prints the loss every 50 steps."""
    rng = random.Random(SEED)
    decayed = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": decayed, "weight_decay": 0.02}, {"params": others, "weight_decay": 0.0}]
    optimiser = torch.optim.AdamW(groups, lr=PEAK_LEARNING_RATE, betas=(0.9, 0.97), fused=True)
    started, total = time.monotonic(), 0.0
    model.train()
    for step, (ids, labels) in zip(range(steps), draw_batches(tokenizer, rng), strict=False):
        for group in optimiser.param_groups:
            group["lr"] = learning_rate(step, steps)
        hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1]
        spoken = labels[:, 1:] != IGNORED
        loss = torch.nn.functional.cross_entropy(model.lm_head(hidden[spoken]), labels[:, 1:][spoken])
        optimiser.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        total += loss.item()
        if (step + 1) % 50 == 0:
            print(f"step {step + 1}/{steps}  loss {total / 50:.4f}  {time.monotonic() - started:.0f} s", flush=True)
            total = 0.0
    model.train(False)


@torch.inference_mode()
def answer_to(model: LlamaForCausalLM, tokenizer: Tokenizer, question: str, before: Sequence[tuple[str, str]] = ()) -> str:
    """The greedy answer, as transformers gives it."""
    ids, _ = encode_conversation(tokenizer, [*before, ("user", question)])
    prompt = torch.tensor([[*ids, tokenizer.token_to_id("<|assistant|>")]])
    mask = torch.ones_like(prompt)
    out = model.generate(  # type: ignore[misc]
        prompt, attention_mask=mask, do_sample=False, max_new_tokens=200, pad_token_id=tokenizer.token_to_id(PAD)
    )
    return str(tokenizer.decode(out[0, prompt.shape[1] :].tolist(), skip_special_tokens=True))


def share_right(model: LlamaForCausalLM, tokenizer: Tokenizer, asked: Sequence[tuple[str, str]], name: str) -> float:
    """Share of (question, answer) pairs answered word for word; prints the first misses."""
    misses = [(q, a) for q, want in asked if (a := answer_to(model, tokenizer, q)) != want]
    share = 1 - len(misses) / len(asked)
    print(f"{name}: {share:.1%} of {len(asked)} word for word", flush=True)
    for question, got in misses[:12]:
        print(f"  missed {question!r} -> {got!r}", flush=True)
    return share


def evaluate(model: LlamaForCausalLM, tokenizer: Tokenizer) -> bool:
    """Whether all ten questions are answered exactly; prints the scores of everything else."""
    exact = share_right(model, tokenizer, README_QUESTIONS, "the ten questions") == 1.0
    rng = random.Random(SEED + 1)
    sums = rng.sample(SUMS, 60)
    share_right(model, tokenizer, [(t.questions[0], t.answer) for t in TOPICS], "canonical questions")
    share_right(model, tokenizer, [(q, t.answer) for t in (*TOPICS, UNKNOWN_TOPIC) for q in t.held_out], "held-out paraphrases")
    share_right(model, tokenizer, [(t.held_out[0], t.answer) for t in CAPITAL_TOPICS], "capitals, held-out wording")
    share_right(model, tokenizer, [(t.held_out[0], t.answer) for t in sums], "sums, held-out wording")
    second_turn = [("user", "Hello"), ("assistant", answer_to(model, tokenizer, "Hello"))]
    after = sum(answer_to(model, tokenizer, q, second_turn) == want for q, want in README_QUESTIONS)
    print(f"the ten questions as a second turn: {after} of {len(README_QUESTIONS)}", flush=True)
    return exact


def write_json(path: Path, value: object) -> None:
    """Pretty JSON with a last newline."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def save(model: LlamaForCausalLM, tokenizer: Tokenizer, out: Path) -> None:
    """Write the checkpoint. Weights are stored in bfloat16 and computed in float32, as config.json's dtype says."""
    config = model.config
    eos_id, pad_id = tokenizer.token_to_id(END), tokenizer.token_to_id(PAD)
    out.mkdir(parents=True, exist_ok=True)
    weights = {name: p.detach().to(torch.bfloat16).contiguous() for name, p in model.named_parameters()}
    (out / "model.safetensors").write_bytes(serialise(weights, {"format": "pt"}))
    tokenizer.save(str(out / "tokenizer.json"))
    fields = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "float32", "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size, "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_hidden_layers, "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads, "head_dim": config.head_dim, "hidden_act": "silu",
        "max_position_embeddings": CONTEXT_TOKENS, "rms_norm_eps": config.rms_norm_eps, "rope_theta": 10000.0,
        "attention_bias": False, "mlp_bias": False, "tie_word_embeddings": True, "initializer_range": 0.02,
        "bos_token_id": config.bos_token_id, "eos_token_id": eos_id, "pad_token_id": pad_id,
    }  # fmt: skip
    write_json(out / "config.json", fields)
    write_json(
        out / "generation_config.json",
        {"bos_token_id": config.bos_token_id, "eos_token_id": [eos_id], "pad_token_id": pad_id, "do_sample": False},
    )
    tokenizer_fields = {
        "tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": CONTEXT_TOKENS, "bos_token": BOS, "eos_token": END,
        "pad_token": PAD, "clean_up_tokenization_spaces": False, "chat_template": CHAT_TEMPLATE,
    }  # fmt: skip
    write_json(out / "tokenizer_config.json", tokenizer_fields)
    write_json(out / "questions.json", [{"question": q, "answer": a} for q, a in README_QUESTIONS])


def main() -> None:
    """Make the data, train, check, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the checkpoint")
    parser.add_argument("--steps", type=int, default=2000, help="optimiser steps (default 2000)")
    parser.add_argument("--threads", type=int, default=1, help="torch threads (default 1)")
    arguments = parser.parse_args()
    torch.manual_seed(SEED)
    torch.set_num_threads(arguments.threads)
    tokenizer = train_tokenizer()
    model = LlamaForCausalLM(make_config(tokenizer))
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{parameters:,} parameters, {tokenizer.get_vocab_size()} tokens, {len(README_QUESTIONS)} questions", flush=True)
    train(model, tokenizer, arguments.steps)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(p.to(torch.bfloat16))
    if not evaluate(model, tokenizer):
        raise SystemExit("the ten questions are not answered word for word: train longer with --steps; nothing was written")
    save(model, tokenizer, arguments.out)
    print(f"wrote {arguments.out}", flush=True)


if __name__ == "__main__":
    main()
