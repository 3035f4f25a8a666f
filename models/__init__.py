"""A model as blocks: import, cut, store by content hash, verify, open and run whole as the oracle."""
