"""Bearer tokens of servers.

    REDISTILL_TOKENS='https://data.example.org=TOKEN http://10.1.2.3:8080=TOKEN'     each goes to its server only
    HF_TOKEN, or what 'hf auth login' stored                                         for hf://

They come from the environment or from the store of huggingface_hub, and are never printed.
"""

from __future__ import annotations

import os
import re
from urllib.parse import unquote, urlsplit

from redistill_cache.addresses import Address, parse_address
from redistill_cache.errors import Refused, UsageError
from redistill_cache.wording import one_line

__all__ = ["on_the_hub", "token_of"]

VARIABLE = "REDISTILL_TOKENS"
ENTRY = re.compile(r"(https?://[^\s=/]+)=([A-Za-z0-9._~+/-]+=*)")
KINDS = {"datasets": "dataset", "spaces": "space"}


def token_of(address: Address) -> str | None:
    """The header of a request to this server, if the environment has a token for it."""
    for entry in os.environ.get(VARIABLE, "").split():
        match = ENTRY.fullmatch(entry)
        if match is None:
            raise UsageError(f"{VARIABLE}: expected https://HOST=TOKEN, separated by blanks; found something else")
        server = urlsplit(match[1])
        if (server.scheme, server.netloc.lower()) == (address.scheme, address.parts.netloc.lower()):
            return f"Bearer {match[2]}"
    return None


def on_the_hub(address: Address) -> Address:
    """The https address of a file at hf://[datasets/]ORG/NAME[@REVISION]/PATH, with the user's token."""
    try:
        import huggingface_hub  # type: ignore[import-not-found, unused-ignore]
    except ImportError as error:
        raise Refused(
            f"{address}: hf:// needs a package that is not installed ({one_line(error)}); pip install 'redistill[hub]'"
        ) from error
    kind, *rest = [address.parts.netloc, *address.parts.path.strip("/").split("/")]
    owner, *rest = rest if kind in KINDS else [kind, *rest]
    if len(rest) < 2:
        raise UsageError(f"{address}: expected hf://[datasets/]ORG/NAME[@REVISION]/PATH")
    name, _, revision = rest[0].partition("@")
    url = huggingface_hub.hf_hub_url(
        f"{owner}/{name}", unquote("/".join(rest[1:])), repo_type=KINDS.get(kind), revision=unquote(revision) or None
    )
    found = parse_address(url, ("https", "http"))
    token = huggingface_hub.get_token()
    return Address(found.parts, f"Bearer {token}" if token else None)
