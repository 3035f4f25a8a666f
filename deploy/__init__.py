"""What puts Resplit on machines: units of systemd, configurations of NATS servers, manifests of Kubernetes, bundles.

No part of the program. An installed Resplit has the units along, so that `resplit install-service` finds them.
"""
