"""Generated messages of etcd's v3 API. Sources, notice and the command to regenerate: third_party/etcd."""
