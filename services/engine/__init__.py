"""The engine: hosts replicas of deployments and runs generations on them."""
