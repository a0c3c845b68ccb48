"""The control plane at a size that no single machine has, in virtual time."""
