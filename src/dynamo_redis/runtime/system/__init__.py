"""Health and metrics of a process, for Kubernetes, Prometheus and people: `/health`, `/live`, `/metrics`."""
