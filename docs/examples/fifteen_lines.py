"""Stream a sum from `adder`, embed a sentence with `minilm`: fifteen_lines.py URL keys/app.nk _INBOX.client.app"""

import asyncio
import json
import sys

import nats


async def main() -> None:
    async with await nats.connect(sys.argv[1], nkeys_seed=sys.argv[2], inbox_prefix=sys.argv[3]) as nc:
        replies = await nc.subscribe(inbox := nc.new_inbox())
        await nc.publish("resplit.v1.infer.adder", b'{"prompt": "348+1275=", "stream": true}', inbox)
        reply: dict[str, object] = {}
        while not reply.keys() & {"finish_reason", "error"}:
            reply = json.loads((await replies.next_msg(30)).data)
            print(reply.get("text", reply.get("error", "")), end="", flush=True)
        answer = await nc.request("resplit.v1.infer.minilm", b'{"input": "The cut may move."}', timeout=30)
        print("\n", json.loads(answer.data)["data"][0]["embedding"][:4])


asyncio.run(main())
