"""A proxy before vLLM's two servers: ``vllm_proxy.py PORT PREFILL_URL DECODE_URL``.

Every request goes to the prefill server first, for one token and the whereabouts of its KV, then
with those to the decode server, whose stream is passed on byte by byte: the order of vLLM's own
example. Runs in vLLM's environment, on the aiohttp that comes with it.
"""

from __future__ import annotations

import sys

from aiohttp import ClientSession, ClientTimeout, TCPConnector, web

ASK_FOR_KV = {
    "do_remote_decode": True,
    "do_remote_prefill": False,
    "remote_engine_id": None,
    "remote_block_ids": None,
    "remote_host": None,
    "remote_port": None,
}


async def complete(request: web.Request) -> web.StreamResponse:
    body = await request.json()
    session: ClientSession = request.app["session"]
    first = {**body, "stream": False, "max_tokens": 1, "kv_transfer_params": ASK_FOR_KV}
    async with session.post(request.app["prefill"] + request.path, json=first) as answer:
        if answer.status != 200:
            return web.Response(status=answer.status, text=await answer.text())
        parameters = (await answer.json())["kv_transfer_params"]
    rest = {**body, "kv_transfer_params": parameters}
    async with session.post(request.app["decode"] + request.path, json=rest) as answer:
        stream = web.StreamResponse(status=answer.status)
        stream.content_type = answer.content_type
        await stream.prepare(request)
        async for chunk in answer.content.iter_any():
            await stream.write(chunk)
        await stream.write_eof()
        return stream


async def sessions(app: web.Application) -> None:
    connector, timeout = TCPConnector(limit=0), ClientTimeout(total=600)
    async with ClientSession(connector=connector, timeout=timeout) as app["session"]:
        yield


if __name__ == "__main__":
    app = web.Application(client_max_size=1 << 24)
    app["prefill"], app["decode"] = sys.argv[2], sys.argv[3]
    app.cleanup_ctx.append(sessions)
    app.router.add_post("/v1/completions", complete)
    web.run_app(app, host="127.0.0.1", port=int(sys.argv[1]), print=None)
