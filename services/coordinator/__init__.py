"""The coordinator: a singleton that knows which replicas serve a deployment, and tells the gateways."""
