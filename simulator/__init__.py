"""A world in a seed: nodes, links, faults and requests in virtual time, around the code that decides in production."""
