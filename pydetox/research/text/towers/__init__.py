"""Research on text towers: Struppek's attack planted in small CLIPs, and the benchmark."""

from __future__ import annotations
