"""Talk to a deployment with OpenAI's own client: chat.py MODEL WORDS... (the gateway is at $RESPLIT_HTTP)"""

import os
import sys

from openai import OpenAI

client = OpenAI(
    base_url=os.environ.get("RESPLIT_HTTP", "http://127.0.0.1:8000") + "/v1",
    api_key=os.environ.get("RESPLIT_API_KEY", "none"),
)
model, words = sys.argv[1], " ".join(sys.argv[2:])
stream = client.chat.completions.create(
    model=model,
    messages=[{"role": "user", "content": words}],
    max_tokens=64,
    stream=True,
    stream_options={"include_usage": True},
)
for chunk in stream:
    for choice in chunk.choices:
        print(choice.delta.content or "", end="", flush=True)
    if chunk.usage is not None:
        print(f"\n({chunk.usage.completion_tokens} tokens)")
