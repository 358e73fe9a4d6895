"""The suite `registry`: registry and objects beside etcd."""
