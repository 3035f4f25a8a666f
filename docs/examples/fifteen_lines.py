"""Stream a sum from `adder`, embed a sentence with `minilm`; in the folder of a client: fifteen_lines.py URL NAME"""

import asyncio
import json
import ssl
import sys

import nats


async def main(url: str, name: str) -> None:
    tls = ssl.create_default_context(cafile="ca.pem")
    tls.load_cert_chain(f"{name}.tls.pem", f"{name}.tls.key")
    login = {"nkeys_seed": f"{name}.nk", "inbox_prefix": f"_INBOX.client.{name}"}
    async with await nats.connect(url, tls=tls, tls_handshake_first=True, **login) as nc:
        replies = await nc.subscribe(inbox := nc.new_inbox())
        await nc.publish("resplit.v1.infer.adder", b'{"prompt": "348+1275=", "stream": true}', inbox)
        reply: dict[str, object] = {}
        while not reply.keys() & {"finish_reason", "error"}:
            reply = json.loads((await replies.next_msg(30)).data)
            print(reply.get("text", reply.get("error", "")), end="", flush=True)
        answer = await nc.request("resplit.v1.infer.minilm", b'{"input": "The cut may move."}', timeout=30)
        print("\n", json.loads(answer.data)["data"][0]["embedding"][:4])


asyncio.run(main(*sys.argv[1:]))
