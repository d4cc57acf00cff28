"""Writes ``deploy/grafana/dashboards/*.json``."""

import json

from deploy.grafana import acceptance, alignment, serving, vocabulary
from deploy.grafana.build import DIRECTORY

DIRECTORY.mkdir(exist_ok=True)
for content in (serving.DASHBOARD, acceptance.DASHBOARD, vocabulary.DASHBOARD, alignment.DASHBOARD):
    (DIRECTORY / f"{content['uid']}.json").write_text(json.dumps(content, indent=1) + "\n")
