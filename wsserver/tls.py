"""TLS for the listening socket: one context, whose certificate can be read anew while connections go on."""

import ssl

from wsserver.config import BadSetting


def server_context(certificate: str, key: str) -> ssl.SSLContext | None:
    """Make the context of a server; None if there is no certificate.

    Raises:
        BadSetting: the files cannot be used.
    """
    if not certificate and not key:
        return None
    if not certificate or not key:
        raise BadSetting("--tls-cert and --tls-key: give both; a file that holds the two can be named twice")
    context = _context()
    load(context, certificate, key)
    return context


def load(context: ssl.SSLContext, certificate: str, key: str) -> None:
    """Read a certificate and its key into a context; connections that are open keep what they have.

    Raises:
        BadSetting: the files cannot be used; the context is as it was.
    """
    # First into one that nobody uses: a key that does not match would leave this one without any.
    for each in (_context(), context):
        try:
            each.load_cert_chain(certificate, key, password=_no_password)
        except OSError as error:
            why = error.reason if isinstance(error, ssl.SSLError) else error.strerror
            raise BadSetting(f"--tls-cert, --tls-key: {certificate}, {key}: {why}") from None


def _context() -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    return context


def _no_password() -> str:
    """Be asked for the password of a key instead of the terminal, where nobody may sit."""
    return ""
