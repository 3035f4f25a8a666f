"""What msgpack lacks for hostile bytes: headers that keep their word, and flat arrays read in one spelling alone."""

import msgpack


def check_announced(data: bytes | memoryview) -> None:
    """Raise `msgpack.UnpackException` unless all that the headers in `data` announce follows in it.

    msgpack makes room for what a header announces before it has seen any of it: five bytes take 80 KiB, and five
    hundred headers, one within the other, 39 MiB. Passing over the values first takes no memory.
    """
    unpacker = msgpack.Unpacker(max_buffer_size=max(1, len(data)))
    unpacker.feed(data)
    while True:
        unpacker.skip()
        if unpacker.tell() >= len(data):
            return


def read_flat(data: bytes, parts_max: int) -> list[object] | None:
    """The parts of the array that is all of `data`: text, bytes, numbers and the like; None for anything else.

    Nothing in it may be nested, or a megabyte of empty arrays would become a hundred before anybody had verified it.
    And it must be the bytes that `msgpack.packb` gives: a signature covers what the parts say and not how they are
    framed, so the same event could else be shown in many spellings, each with a digest of its own.
    """
    unpacker = msgpack.Unpacker(max_buffer_size=max(1, len(data)), max_array_len=0, max_map_len=0, max_ext_len=0)
    try:
        unpacker.feed(data)
        count = unpacker.read_array_header()
        if count > parts_max:
            return None
        parts: list[object] = [unpacker.unpack() for _ in range(count)]
        return parts if msgpack.packb(parts) == data else None
    except Exception:  # msgpack raises a dozen types on hostile bytes; all mean the same here.
        return None
