"""A world in a seed: nodes, links, faults and requests in virtual time, around the decision code that runs in production."""
