"""The gateway's HTTP door."""
