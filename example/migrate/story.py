"""From the predecessor: the loader takes over its directory while Envoy serves from it."""

from __future__ import annotations

from example.support.cluster import Proxy
from example.support.story import Story, milliseconds, shares

STATS = "http.ingress.rds.podinfo"
OLD = ("bold-olm", "eerie-octopus")


def leave(proxy: Proxy, files: dict[str, str]) -> None:
    """The directory as the predecessor leaves it: real files in current/, and an empty new/."""
    for name in ("new", "current"):
        (proxy.output_dir / name).mkdir(parents=True)
    for name, content in files.items():
        place = proxy.output_dir / "current" / name
        place.write_text(content)
        place.chmod(0o644)


def listing(proxy: Proxy) -> list[str]:
    """What is in the output directory, with the targets of links."""
    found = []
    for path in sorted(proxy.output_dir.rglob("*")):
        name = path.relative_to(proxy.output_dir)
        if path.is_symlink():
            found.append(f"  {name} -> {path.readlink()}")
        elif name.parts[0] in ("current", "new"):
            found.append(f"  {name}{'/' if path.is_dir() else ''}")
    return found


def tell(story: Story) -> None:
    cluster = story.cluster
    story.title("The predecessor's pod, as its chart made it")
    story.kubectl("kubectl apply -k .")
    for name in OLD:
        cluster.pod(name)
    proxy = cluster.schedule("envoy")
    routes = cluster.read("configmap.yaml")[0]["data"]["rds.yaml"]
    leave(proxy, {"rds.yaml": routes})
    cluster.start_envoy(proxy)
    story.watch(lambda: listing(proxy), 0)
    poller = story.load(proxy.url(10000))
    story.until(lambda: len(poller.answers) > 50, "answers")

    story.title("The loader takes over, with the predecessor's arguments")
    story.kubectl("kubectl apply -f after.yaml")
    before, warm = proxy.envoy.stats(STATS), len(poller.answers)
    proxy.spec = cluster.spec("envoy")
    cluster.run_init(proxy)
    cluster.start_loaders(proxy)
    story.watch(lambda: listing(proxy))
    story.until(lambda: len(poller.answers) > warm + 50, "answers")
    after = proxy.envoy.stats(STATS)
    reloads = f"{STATS}.config_reload"
    story.claim("routes changed by the take-over", before[reloads] == after[reloads],
                int(after[reloads]) - int(before[reloads]))  # fmt: skip
    served = {answer.body for answer in poller.answers}
    story.claim("answers until then came from", served == {"bold-olm"}, ", ".join(served))
    link = (proxy.output_dir / "current/rds.yaml").is_symlink()
    story.claim("current/rds.yaml", link, "was a file, is a link into a snapshot")

    story.title("And from then on")
    sent = story.kubectl("kubectl apply -f weights-0-100.yaml")
    seen = poller.wait_body("eerie-octopus", 5, after=sent).time - sent
    value = f"{milliseconds(seen)} from the PATCH to the first answer"
    story.claim("a change", seen < 1, value)
    story.watch(lambda: [f"  {shares(poller)}"])

    story.title("Tidy up: a new pod, without what is no longer needed")
    story.kubectl("kubectl apply -f tidy.yaml")
    tidy = cluster.run("envoy")
    other = story.load(tidy.url(10000))
    story.until(lambda: len(other.answers) > 20, "answers")
    story.verdict([poller, other], [proxy])
    story.play([
        f"curl -s {proxy.url(10000)}",
        f"ls -lR {proxy.output_dir}",
    ])  # fmt: skip
