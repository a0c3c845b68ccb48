"""The test kit: real etcd, scripted answers, conformance checks, fault injectors. For tests; nothing that serves imports it."""
