"""What puts Resplit on machines: units of systemd, configurations of NATS servers, manifests for Kubernetes.

No code. An installed Resplit has the units along, so that `resplit install-service` finds them.
"""
