"""How the two ends of a data connection prove to each other that they hold the cluster's key.

    connector -> listener   hello    version, the connector's nonce
    listener -> connector   answer   the listener's nonce and proof
    connector -> listener   proof    the connector's

Mutual authentication in three passes (ISO/IEC 9798-4). A proof is an HMAC-SHA256 over who proves,
both nonces and the address that was dialled, so it serves neither the other direction nor another
connection, nor can a third worker pass it on. It says who is there when the connection is made;
what travels later is neither encrypted nor signed. Pure functions of bytes: whoever carries them
bounds their time.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets

_VERSION = b"kvferry1"
_NONCE_BYTES = 32
_PROOF_BYTES = hashlib.sha256().digest_size
HELLO_BYTES = len(_VERSION) + _NONCE_BYTES
ANSWER_BYTES = _NONCE_BYTES + _PROOF_BYTES
PROOF_BYTES = _PROOF_BYTES


class NotProvenError(Exception):
    """The peer is none of the cluster's, or not of this version."""


class Connector:
    """The end that dialled ``address``."""

    def __init__(self, cluster_key: bytes, address: bytes) -> None:
        self._key, self._address = _derive(cluster_key), address
        self._nonce = secrets.token_bytes(_NONCE_BYTES)
        self.hello = _VERSION + self._nonce

    def prove(self, answer: bytes) -> bytes:
        """Check the listener's answer; our own proof. Raises NotProvenError."""
        nonce, proof = answer[:_NONCE_BYTES], answer[_NONCE_BYTES:]
        said = (self._nonce, nonce, self._address)
        _check(proof, _proof(self._key, b"listener", *said))
        return _proof(self._key, b"connector", *said)


class Listener:
    """The end that was reached, at its own ``address``, by a peer that said ``hello``."""

    def __init__(self, cluster_key: bytes, address: bytes, hello: bytes) -> None:
        """Raises NotProvenError for a hello of another version."""
        version, nonce = hello[: len(_VERSION)], hello[len(_VERSION) :]
        if version != _VERSION:
            raise NotProvenError("the peer speaks another version")
        mine = secrets.token_bytes(_NONCE_BYTES)
        said = (nonce, mine, address)
        key = _derive(cluster_key)
        self.answer = mine + _proof(key, b"listener", *said)
        self._expected = _proof(key, b"connector", *said)

    def check(self, proof: bytes) -> None:
        """Raises NotProvenError unless the connector holds the key."""
        _check(proof, self._expected)


def _derive(cluster_key: bytes) -> bytes:
    """A key for this purpose alone."""
    return hmac.digest(cluster_key, b"kvferry data plane", "sha256")


def _proof(key: bytes, who: bytes, connector: bytes, listener: bytes, address: bytes) -> bytes:
    return hmac.digest(key, who.ljust(16, b"\0") + connector + listener + address, "sha256")


def _check(proof: bytes, expected: bytes) -> None:
    if not hmac.compare_digest(proof, expected):
        raise NotProvenError("the peer does not hold the cluster's key")
