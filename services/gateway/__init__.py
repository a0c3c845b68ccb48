"""The gateway: OpenAI's HTTP API and gRPC in front of the engines."""
