"""`inferctl`: start a cluster on one machine, apply deployments, look at them, talk to them."""
