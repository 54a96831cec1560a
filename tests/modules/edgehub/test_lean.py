"""What edgehub does without: a node whose link is a websocket pays for no QUIC."""

import subprocess
import sys

HEAVY = ("aioquic", "google.protobuf", "cryptography", "OpenSSL", "http.client", "runtime.viaduct")


def test_a_websocket_link_loads_nothing_of_quic() -> None:
    code = (
        "import sys\n"
        "from modules.edgehub.config import EdgeHubConfig, Endpoint\n"
        "import modules.edgehub.hub\n"
        "from modules.edgehub.link import make_encoder, make_link\n"
        "config = EdgeHubConfig(node_name='e', endpoints=(Endpoint('c', 1),))\n"
        "make_link(config), make_encoder(config)\n"
        f"print([name for name in {HEAVY!r} if name in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "[]"
