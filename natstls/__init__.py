"""TLS between the NATS server and whoever connects to it. Needs nats-py and none of our other packages."""
