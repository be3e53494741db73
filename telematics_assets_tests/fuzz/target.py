"""A fuzzer over the readers of text: `python -m telematics_assets_tests.fuzz.target [--reader R] [--seconds N]`.

Belongs here: where the bytes come from (seeds made by code, then mutations) and which check each of them takes.
Does not belong here: what must hold (`oracle.py`).

With atheris, which knows Linux on x86-64 and not every Python, mutations follow what the readers' code branches on;
without it they are blind. A finding ends the process with the bytes on stderr.
"""

from __future__ import annotations

import argparse
import gzip
import importlib.util
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

READERS = ("json", "document", "csv")
#: Pieces that blind mutations put in, and that atheris is told of.
TOKENS = (
    *(bytes([char]) for char in b'{}[]",:\\\r\n\t 0-.eE'),
    *(b"\r\n", b"true", b"false", b"null", b"NaN", b"Infinity", b"1e400", b"-0", b"01", b"\\u0061", b"\\ud83d\\ude00"),
    *(b"\\ud800", b"\\u0000", b"\x00", b"\xff", b"\xc3", b"\xed\xa0\x80", b"\xef\xbb\xbf", b"\xe2\x80\xa8", b'""'),
    *(b'"a":', b'"_file_path":1', b"base64:", b'{"a":1}', b'","', b"\\\\", b'\\"', b"[" * 260, b"\x1f\x8b"),
)


def seeds() -> list[bytes]:
    """Files of every kind that the readers tell apart."""
    records = [
        b'{"a":1,"b":"x","c":null}',
        b'{"a": 1.10, "b": "p, q", "c": {"m": [1, {}]}}',
        b'{"x":1e400,"a":"\\u00e9\\ud83d\\ude00\\"\\\\","_file_path":2}',
        '{"é":"ł","b":true,"z":[]}'.encode(),
        b"{}",
    ]
    broken = [b'{"a":1', b'{"a":1,"a":2}', b'{"a":"\xff"}', b'{"a":"\\ud800"}', b"[1]", b"base64:eA==", b"\x00", b" "]
    mixed = [*records, *broken]
    return [
        b"",
        b"\n",
        *(record + b"\n" for record in mixed),
        b"\n".join(mixed),
        b"\r\n".join(mixed) + b"\r",
        b"\r".join(records),
        b"\xef\xbb\xbf" + b"\n".join(records),
        "\n".join('{"a":1}' for _ in range(3)).encode("utf-16"),
        b"[" + b",".join(records) + b"]",
        b"[" + b" ,\n".join(mixed) + b"] {}",
        b'{"a":\n1}\n{"b":"]"}[{}',
        b'{"a":' * 255 + b"1" + b"}" * 255,
        b'{"a":' + b"[" * 300 + b"]" * 300 + b"}",
        b'a,b,c\n1,"2,""x",3\r\n"multi\nline",,\n\n4\n5,6,7,8\n"open',
        gzip.compress(b"\n".join(mixed), mtime=0),
        gzip.compress(records[0], mtime=0)[:-3],
    ]


def mutated(random: random.Random, pool: Sequence[bytes]) -> bytes:
    """A seed after a few blind changes."""
    data = bytearray(random.choice(pool))
    for _ in range(random.randint(1, 6)):
        at = random.randint(0, len(data))
        match random.randrange(6):
            case 0:
                data[at:at] = random.choice(TOKENS)
            case 1:
                del data[at : at + random.randint(1, 8)]
            case 2:
                data[at : at + 1] = bytes([random.randrange(256)])
            case 3:
                other = random.choice(pool)
                data[at:at] = other[: random.randint(0, len(other))]
            case 4:
                data[at:] = data[random.randint(0, len(data)) :]
            case 5:
                end = random.randint(at, min(len(data), at + 40))
                data[at:at] = data[at:end]
    return bytes(data[:4000])


def blind(check: Callable[[bytes], None], runs: int | None, seconds: float, seed: int) -> int:
    """Check seeds and their mutations; how many."""
    random_ = random.Random(seed)
    pool = seeds()
    end = time.monotonic() + seconds
    done = 0
    while done < runs if runs is not None else time.monotonic() < end:
        data = pool[done] if done < len(pool) else mutated(random_, pool)
        try:
            check(data)
        except BaseException:
            print(f"finding: {data!r}", file=sys.stderr, flush=True)  # noqa: T201 - it is a command
            raise
        done += 1
    return done


def guided(reader: str, runs: int | None, seconds: float, seed: int, corpus: str) -> None:
    """Let atheris find bytes; it ends the process."""
    import atheris

    with atheris.instrument_imports(include=["telematics_assets.autoloader"]):
        from telematics_assets_tests.fuzz import oracle  # noqa: F401 - its imports are instrumented
    folder = Path(corpus)
    folder.mkdir(parents=True, exist_ok=True)
    for number, data in enumerate(seeds()):
        (folder / f"seed{number:03}").write_bytes(data)
    tokens = folder.with_name(f"{folder.name}.dict")
    tokens.write_text("".join('"' + "".join(f"\\x{byte:02x}" for byte in token) + '"\n' for token in TOKENS))
    limit = f"-runs={runs}" if runs is not None else f"-max_total_time={seconds:g}"
    options = [limit, f"-seed={seed}", f"-dict={tokens}", "-max_len=4000", "-rss_limit_mb=2048", "-timeout=60"]
    atheris.Setup([sys.argv[0], *options, f"-artifact_prefix={folder}/", str(folder)], check_of(reader))
    atheris.Fuzz()


def check_of(reader: str) -> Callable[[bytes], None]:
    """What must hold of what a reader makes of some bytes."""
    from telematics_assets_tests.fuzz import oracle

    checks = {"json": oracle.check_json_lines, "document": oracle.check_json_document, "csv": oracle.check_csv}
    return checks[reader]


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--reader", choices=READERS, default="json")
    parser.add_argument("--runs", type=int, help="inputs to try; as many as fit into the time if left out")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--blind", action="store_true", help="without atheris, even if it is there")
    parser.add_argument("--corpus", help="folder for what atheris learns; a temporary one if left out")
    asked = parser.parse_args()
    if asked.blind or importlib.util.find_spec("atheris") is None:
        print(f"{blind(check_of(asked.reader), asked.runs, asked.seconds, asked.seed)} inputs, blind")  # noqa: T201
        return
    with tempfile.TemporaryDirectory() as scratch:
        guided(asked.reader, asked.runs, asked.seconds, asked.seed, asked.corpus or os.path.join(scratch, "corpus"))


if __name__ == "__main__":
    main()
