"""The small files around a packaged engine: the program, the requirements, the container and the service."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from importlib import metadata

from packaging.requirements import Requirement

DISTRIBUTION = "latent-compress"
DEADLINE_S = 120
"""The longest a request may take by default; who stops the server waits as long."""

RUN = '''"""Draws one picture: python run.py "a large red circle" 7 circle.png."""

import sys
from pathlib import Path

from PIL import Image

from export.engine import Engine

prompt, seed, file = sys.argv[1:4]
picture = Engine.open(Path(__file__).parent / "engine").generate([prompt], [int(seed)])[0]
Image.fromarray(picture).save(file)
'''

DOCKERFILE = """FROM python:{python}-slim
WORKDIR /srv/engine
COPY requirements.txt ./
RUN pip install --no-cache-dir --requirement requirements.txt \\
    && useradd --system --no-create-home --uid 10001 engine
COPY . ./
USER 10001
EXPOSE 8000
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --start-period=60s \\
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/healthz', timeout=5)"]
ENTRYPOINT ["python", "-m", "serve", "engine", "--host", "0.0.0.0"]
CMD ["--keys", "/run/secrets/keys"]
"""

SERVICE = """[Unit]
Description=Pictures of a latent diffusion engine over HTTP
After=network.target

[Service]
Type=exec
WorkingDirectory=/srv/engine
ExecStart=/srv/engine/.venv/bin/python -m serve engine --keys ${{CREDENTIALS_DIRECTORY}}/keys
LoadCredential=keys:/etc/engine/keys
Environment=PYTHONDONTWRITEBYTECODE=1
Restart=on-failure
TimeoutStopSec={stop}
DynamicUser=yes
NoNewPrivileges=yes
CapabilityBoundingSet=
PrivateDevices=yes
PrivateTmp=yes
ProtectClock=yes
ProtectControlGroups=yes
ProtectHome=yes
ProtectHostname=yes
ProtectKernelLogs=yes
ProtectKernelModules=yes
ProtectKernelTunables=yes
ProtectSystem=strict
RestrictAddressFamilies=AF_INET AF_INET6
RestrictNamespaces=yes
RestrictRealtime=yes
RestrictSUIDSGID=yes
SystemCallArchitectures=native
SystemCallFilter=@system-service

[Install]
WantedBy=multi-user.target
"""


def dockerfile() -> str:
    """A container of the server, for the Python that runs now."""
    return DOCKERFILE.format(python=".".join(platform.python_version_tuple()[:2]))


def service() -> str:
    """A systemd unit of the server."""
    return SERVICE.format(stop=DEADLINE_S + 30)


def requirements(names: Sequence[str]) -> str:
    """Packages as pip reads them: the version that is installed here, or else what this project asks for."""
    asked = {found.name: found for found in map(Requirement, metadata.requires(DISTRIBUTION) or ())}
    lines = []
    for name in sorted(names):
        try:
            lines.append(f"{name}=={metadata.version(name)}")
        except metadata.PackageNotFoundError:
            lines.append(f"{name}{asked[name].specifier if name in asked else ''}")
    return "\n".join(lines) + "\n"
