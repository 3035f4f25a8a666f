"""The front door for applications and people: OpenAI's API and the Open Inference Protocol over HTTP, and a dashboard.

It is a client of the bus like any other: nothing that it does could not be done over the subjects directly. With the
folder of an observer beside it also shows what that may see.
"""
