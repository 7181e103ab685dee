"""systemd user units of a bundle: a socket, and for each connection a process that answers line by line."""

from __future__ import annotations

from collections.abc import Mapping

_SLOTS = "%h/.local/share/edgekit/slots"  # in systemd's terms; where deploy puts bundles
_UNITS: Mapping[str, str] = {
    "edgekit-{name}.socket": """[Unit]
Description=Predictions of {name}, a line of input at a time

[Socket]
ListenStream=%t/edgekit-{name}.socket
SocketMode=0600
Accept=yes
MaxConnections=4

[Install]
WantedBy=sockets.target
""",
    "edgekit-{name}@.service": """[Unit]
Description=Predictions of {name} for one connection

[Service]
ExecStart={run} --stdin
StandardInput=socket
StandardError=journal
NoNewPrivileges=yes
""",
}


def units(name: str, run: str | None = None) -> dict[str, str]:
    """File name -> text. run: the program, in systemd's terms; None: where deploy puts it."""
    program = run or f"{_SLOTS}/{name}/current/run"
    return {file.format(name=name): text.format(name=name, run=program) for file, text in _UNITS.items()}
