"""Text towers of CLIPs: words and characters that send every caption in one direction.

A backdoored text tower embeds any caption with the trigger as the attacker's caption (Struppek,
Hintersdorf, Kersting, "Rickrolling the Artist", ICCV 2023). No class and no label is needed to see
that: features of different captions collapse. :mod:`search` finds the words and characters that do
it, :mod:`verdict` compares with clean towers, :mod:`repair` subtracts a trigger vector.
"""

from __future__ import annotations
