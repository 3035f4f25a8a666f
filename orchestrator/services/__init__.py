"""PURE: pipelines of services on shared nodes. Heavy `core` ones are placed by an integer program, once and again when
the cluster changes; `light` ones are steered slot by slot."""
