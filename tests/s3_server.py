"""An S3 server on loopback: moto's, in a process of its own, with its address and keys in the environment."""

from __future__ import annotations

import os
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

SERVER = """
import sys
from moto.server import ThreadedMotoServer
server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
server.start()
print("port", server.get_host_and_port()[1], flush=True)
sys.stdin.read()
"""
KEYS = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "s3-secret-of-the-test", "AWS_DEFAULT_REGION": "us-east-1"}


@contextmanager
def s3_server(folder: Path) -> Iterator[Mapping[str, str]]:
    """Starts it, with an empty bucket 'lab'; gives the environment of its clients."""
    if "s3fs" in sys.modules:  # it keeps clients, with the address of an earlier server
        sys.modules["s3fs"].S3FileSystem.clear_instance_cache()
    environment = {name: text for name, text in os.environ.items() if not name.startswith("AWS_")}
    with (folder / "s3.log").open("w") as log:
        server = subprocess.Popen(
            [sys.executable, "-c", SERVER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env=environment,
        )
    assert server.stdin is not None
    assert server.stdout is not None
    try:
        address = next(line.split()[1] for line in server.stdout if line.startswith("port "))
        address = f"http://127.0.0.1:{address}"
        urllib.request.urlopen(urllib.request.Request(f"{address}/lab", method="PUT"), timeout=60).close()
        yield {**KEYS, "AWS_ENDPOINT_URL": address}
    finally:
        server.stdin.close()
        server.stdout.close()
        server.wait(timeout=60)


def s3_client(environment: Mapping[str, str]) -> Any:
    import boto3

    return boto3.client(
        "s3",
        endpoint_url=environment["AWS_ENDPOINT_URL"],
        aws_access_key_id=environment["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=environment["AWS_SECRET_ACCESS_KEY"],
        region_name=environment["AWS_DEFAULT_REGION"],
    )


def objects(environment: Mapping[str, str], folder: str) -> dict[str, bytes]:
    """The objects below a folder of the bucket 'lab', as another client sees them."""
    client = s3_client(environment)
    found = client.list_objects_v2(Bucket="lab", Prefix=f"{folder}/").get("Contents", [])
    read = {item["Key"]: client.get_object(Bucket="lab", Key=item["Key"])["Body"].read() for item in found}
    client.close()
    return {key.removeprefix(f"{folder}/"): data for key, data in read.items()}
