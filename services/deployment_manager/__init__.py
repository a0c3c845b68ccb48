"""The deployment manager: a singleton that keeps the catalogue of deployments and makes engines serve them."""
