"""docs/options.md and the table in docs/metrics.md, made from the tables in loader.py.

`python -m tests.support.reference` writes them anew.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import loader
from tests.support.docs import ROOT

OPTIONS_PAGE = ROOT / "docs" / "options.md"
METRICS_PAGE = ROOT / "docs" / "metrics.md"
BEGIN, END = "<!-- metrics: begin -->", "<!-- metrics: end -->"

NOTES = {
    "What to load": """\
- At least one of the first three or `--secret` is needed. They can be combined.
- The later ConfigMap wins where two have the same key, with a warning; those named win over those
  selected, and all of them over files that are rendered.
- `flags:runtime` puts the keys of the ConfigMap `flags` into `runtime/`, as
  [a runtime layer on disk](bootstraps.md#runtime-flags-a-file-a-flag) wants them.
- Nothing is published before every named object exists: `--onetime` fails (after `--timeout`), a
  sidecar waits and logs it.
- A selector is written as for `kubectl -l`: `app=web,tier in (a, b),!legacy`; `*` or an empty one
  selects all. `--configmap-selector` looks into `--namespace`.
""",
    "From where": """\
- In a pod none of these is needed; [previews](previews.md) shows what is needed elsewhere.
- With `--from-file` the options of the API server are ignored. The file has one object, or several
  in a list, as `kubectl get configmap,service,endpointslice -o json` prints them. A sidecar reads
  it again every `--sync-interval`; `-`, standard input, needs `--onetime`.
""",
    "How Services are rendered": """\
- [Rendering](rendering.md) has the rules, [where endpoints live](rendering.md#where-endpoints-live)
  and the reference of the `--config` file.
""",
    "Where to, and when": """\
- Without `--onetime` and `--watch` the loader is a sidecar that polls every `--sync-interval`.
  `--onetime` wins over `--watch`. With `--watch` the files on disk are checked every
  `--sync-interval`, and the API server is not asked again for that.
- Envoy must see the directory under the same path if Services are rendered, since clusters name
  the files of their endpoints. [On disk](on-disk.md) has what is in it.
- `--dry-run` needs no directory and takes no lock. Its first line is the version of the snapshot,
  which `xds_loader_snapshot_info` shows once it is published; JSON files that are not valid JSON
  are named in a warning. `--diff` prints nothing if nothing would change.
- With `--timeout` `--onetime` waits for its sources to exist and for the API server to answer; `0s`
  is one try, with up to a second of retries on 401, 403, 429 and 5xx.
""",
    "ACK and NACK": """\
- With `--envoy-admin` the loader asks Envoy after each publication, steps wait for the answer, and
  what Envoy rejects is rolled back ([ordering](ordering.md)).
- `--step-delay` beside `--envoy-admin` is waited for as well: for further Envoys that read the same
  directory.
- `--check-cmd 'check.sh {dir}'` is split into words as a shell does, but no shell runs it. It has
  30 s, and whatever it started is ended with it. With `--dry-run` it runs on a copy in a temporary
  directory. [One that asks Envoy](troubleshooting.md#a-broken-file-gets-as-far-as-envoy).
""",
    "Log, metrics, probes": """\
- [Probes, metrics and the log](metrics.md) shows what is served and written.
- Without `--listen` no port is open.
- `--help` and `--version` work whatever other values there are.
""",
    "Of the predecessor": """\
- See [migration](migration.md).
""",
}

HEAD = """\
# Options

Made from the table in `loader.py` that also makes the parser and `--help`, by
`python -m tests.support.reference`; `tests/test_docs.py` compares them.

<!-- run: tests/test_docs.py::test_the_command_lines_of_the_options_run -->
```console
envoy-xds-configmap-loader --configmap envoy-xds --onetime --timeout 60s
envoy-xds-configmap-loader --configmap envoy-xds --watch --envoy-admin http://127.0.0.1:9901
envoy-xds-configmap-loader --services 'app in (web, api)' --services-namespace shop --dry-run
```

An option has one dash or two, its value follows after a space or `=`. A switch is on when it is
there; `--watch=false` turns it off. A repeatable option is given several times. Durations are
written as in Go: `250ms`, `30s`, `1m0s`, `1.5h`.

Each option can come from the environment instead: `XDS_LOADER_` and its name in capitals with
underscores (`--sync-interval`: `XDS_LOADER_SYNC_INTERVAL`). The command line wins; an empty
variable counts as unset; values of a repeatable option are separated by white space; a variable
`XDS_LOADER_...` that is not an option gets a warning. Besides these
the loader reads `$NS` and `$POD_NAMESPACE` (namespace), `$NODE_NAME` (for `prefer_zone`), and
`$KUBERNETES_SERVICE_HOST` and `$KUBERNETES_SERVICE_PORT` (API server).

| exit code | when |
| --- | --- |
| 0 | the snapshot is published (`--onetime`), or it was asked to end (SIGTERM, SIGINT) |
| 1 | it tried and could not: one line names what, where and what to do |
| 2 | bad input: one line, before any request and before anything is touched |

SIGHUP makes it check the files on disk and ask the API server now.
"""

TAIL = """\
## What is rejected

Exit code 2, before anything is asked or touched:

<!-- output: tests/test_docs.py::test_what_is_rejected -->
```text
$ envoy-xds-configmap-loader --onetime
envoy-xds-configmap-loader: nothing to load: give --configmap NAME, --configmap-selector, --services or --secret
$ envoy-xds-configmap-loader --configmap x --diff
envoy-xds-configmap-loader: --diff needs --dry-run
$ envoy-xds-configmap-loader --configmap x --from-file -
envoy-xds-configmap-loader: --from-file - needs --onetime
$ envoy-xds-configmap-loader --configmap x --client-cert a.pem
envoy-xds-configmap-loader: --client-cert and --client-key belong together
$ envoy-xds-configmap-loader --configmap x --services-namespace shop
envoy-xds-configmap-loader: --services-namespace needs --services
$ envoy-xds-configmap-loader --configmap x --config c.json
envoy-xds-configmap-loader: --config needs --services
$ envoy-xds-configmap-loader --configmap x --sync-intervall 30s
envoy-xds-configmap-loader: unknown option '--sync-intervall'; see --help
$ envoy-xds-configmap-loader --configmap x --timeout 30
envoy-xds-configmap-loader: --timeout '30': is not a valid duration, such as 30s, 1m0s or 250ms
```
"""  # noqa: E501

# What the values of a label are, where the name alone does not tell.
LABELS = {
    "step": "`initial`, `children`, `clusters`, `references`, `removals`, `rollback`: see "
    "[ordering](ordering.md)",
    "type": "`cds`, `lds`, `rds`, `eds`, `sds`, ... or `other`",
    "file": "path below `current/`",
    "source": "as in the log: `configmap demo/envoy-xds`, `services demo`",
    "reason": "`ended` (by the server, as it does every few minutes), `expired` (410), `cut` "
    "(no answer, or the end of one), `future` (etcd was reset), `refresh` (SIGHUP), "
    "`status <code>`",
    "code": "HTTP status, `none` without an answer",
    "verb": "`list`, `watch`",
    "kind": "`disk`, `damage` (repaired on disk), `check` (`--check-cmd` rejected the files), "
    "`log` (lines that nobody read)",
    "endpoints": "`eds`, `inline`, `dns`",
    "version": "of the loader, of the snapshot",
}


def escaped(text: str) -> str:
    return text.replace("|", "\\|")


def option_row(option: loader.Option) -> str:
    value = f" {escaped(option.metavar)}" if option.metavar else ""
    text = escaped(option.help) + "; repeatable" * option.repeats
    shown = re.fullmatch("[-/0-9][^ ]*", option.default)
    default = f"`{option.default}`" if shown else ""
    default = default or option.default
    return f"| `--{option.name}{value}` | {text} | {default} |"


def options_page() -> str:
    """The whole of docs/options.md."""
    parts = [HEAD]
    for title, options in loader.SECTIONS.items():
        rows = "\n".join(map(option_row, options))
        table = f"| option | meaning | default |\n| --- | --- | --- |\n{rows}\n"
        parts.append(f"## {title}\n\n{table}\n{NOTES[title]}")
    return "\n".join([*parts, TAIL])


def metric_rows() -> Iterator[str]:
    yield "| metric | type | labels | meaning |"
    yield "| --- | --- | --- | --- |"
    for name, kind, names, text in loader.METRICS:
        labels = ", ".join(f"`{label}`" for label in names.split())
        yield f"| `{name}` | {kind} | {labels} | {escaped(text)} |"
    yield ""
    yield "| label | values |"
    yield "| --- | --- |"
    used = {label for _, _, labels, _ in loader.METRICS for label in labels.split()}
    yield from (f"| `{label}` | {LABELS[label]} |" for label in sorted(used))


def metrics_page(page: str) -> str:
    """The page with its table as it must be."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    table = "\n".join(metric_rows())
    return f"{before}{BEGIN}\n{table}\n{END}{after}"


def main() -> None:
    OPTIONS_PAGE.write_text(options_page())
    METRICS_PAGE.write_text(metrics_page(METRICS_PAGE.read_text()))


if __name__ == "__main__":
    main()
