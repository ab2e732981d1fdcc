"""Secrets as SDS files: bytes, checks before publication, and that no text shows a key."""

from __future__ import annotations

import base64
import datetime
import functools
import json
import os
import re
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import trustme
import yaml
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import NameOID
from envoy.extensions.transport_sockets.tls.v3 import secret_pb2
from envoy.service.discovery.v3 import discovery_pb2
from google.protobuf import json_format
from hypothesis import given, settings
from hypothesis import strategies as st

import loader
from tests.conftest import RunLoader
from tests.support.apiserver import ApiServer, Rule

NOW = datetime.datetime(2025, 6, 1, tzinfo=datetime.UTC)
DAY = datetime.timedelta(days=1)
UNREADABLE = "holds no PEM certificate, or an unreadable one"
MISMATCH = "tls.key is not the key of the first certificate in tls.crt"
PrivateKey = rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey


class Pem(NamedTuple):
    cert: bytes
    key: bytes


def pem_of(key: PrivateKey, passphrase: bytes | None = None, form: str = "PKCS8") -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM,
        getattr(serialization.PrivateFormat, form),
        serialization.BestAvailableEncryption(passphrase)
        if passphrase
        else serialization.NoEncryption(),
    )


def self_signed(key: PrivateKey) -> bytes:
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "web.example")])
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(NOW)
        .not_valid_after(NOW + 90 * DAY)
        .sign(key, hashes.SHA256())
    )
    return certificate.public_bytes(serialization.Encoding.PEM)


@functools.cache
def key_of(kind: str) -> PrivateKey:
    if kind.startswith("rsa"):
        return rsa.generate_private_key(65537, int(kind[3:]))
    return ec.generate_private_key({"p256": ec.SECP256R1(), "p384": ec.SECP384R1()}[kind])


@functools.cache
def a_pair(kind: str = "p256") -> Pem:
    key = key_of(kind)
    return Pem(self_signed(key), pem_of(key))


@functools.cache
def a_chain() -> tuple[bytes, bytes, bytes]:
    """Chain (leaf and intermediate), key, and the CA."""
    root = trustme.CA()
    leaf = root.create_child_ca().issue_cert("web.example")
    chain = b"".join(blob.bytes() for blob in leaf.cert_chain_pems)
    assert chain.count(b"BEGIN CERTIFICATE") >= 2
    return chain, leaf.private_key_pem.bytes(), root.cert_pem.bytes()


def api_object(secret: str = "demo/web-tls", kind: str = "kubernetes.io/tls", **data: bytes) -> Any:
    """As the API server gives it; `tls_crt=...` is the key `tls.crt`."""
    namespace, _, name = secret.partition("/")
    return {
        "apiVersion": "v1",
        "kind": "Secret",
        "type": kind,
        "metadata": {"namespace": namespace, "name": name, "resourceVersion": "17"},
        "data": {
            key.replace("_", "."): base64.b64encode(value).decode() for key, value in data.items()
        },
    }


def files_of(form: str = "yaml", **data: Any) -> dict[str, loader.File]:
    found = loader.secret_from(api_object(**data), form)
    assert not found.warnings
    return dict(found.files)


def problems_of(**data: Any) -> str:
    """The problems as one text; a Secret with a problem gives no file at all."""
    with pytest.raises(ValueError, match=r"tls.crt|tls.key|ca.crt") as caught:
        loader.secret_from(api_object(**data))
    return str(caught.value)


def envoy_secret(content: bytes, form: str = "yaml") -> secret_pb2.Secret:
    """Read a file as Envoy does, with an unknown field being an error."""
    body = yaml.safe_load(content) if form == "yaml" else json.loads(content)
    response = json_format.ParseDict(body, discovery_pb2.DiscoveryResponse())
    assert response.version_info
    assert len(response.resources) == 1
    secret = secret_pb2.Secret()
    assert response.resources[0].Unpack(secret)
    return secret


def source_bytes(source: Any) -> bytes:
    return bytes(source.inline_bytes) or source.inline_string.encode()


# -- files ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["yaml", "json"])
@pytest.mark.parametrize("kind", ["kubernetes.io/tls", "Opaque"])
def test_a_tls_secret_is_two_files_that_envoy_reads(form: str, kind: str) -> None:
    chain, key, ca = a_chain()
    obj = api_object(kind=kind, tls_crt=chain, tls_key=key, ca_crt=ca)
    files, problems = loader.secret_from(obj, form, 0o600)
    assert problems == ()
    assert list(files) == [f"demo_web-tls.{form}", f"demo_web-tls_ca.{form}"]
    pair, trusted = (envoy_secret(file.content, form) for file in files.values())
    assert pair.name == "demo/web-tls"
    assert source_bytes(pair.tls_certificate.certificate_chain) == chain
    assert source_bytes(pair.tls_certificate.private_key) == key
    assert trusted.name == "demo/web-tls/ca"
    assert source_bytes(trusted.validation_context.trusted_ca) == ca
    assert {file.source for file in files.values()} == {"secret demo/web-tls"}


def test_a_ca_alone_and_an_empty_ca() -> None:
    assert list(files_of(ca_crt=a_chain()[2])) == ["demo_web-tls_ca.yaml"]
    files = files_of(tls_crt=a_pair().cert, tls_key=a_pair().key, ca_crt=b"")
    assert list(files) == ["demo_web-tls.yaml"]


COMMENTED = {
    "no line break at the end": lambda pem: pem.rstrip(b"\n"),
    "CR LF": lambda pem: pem.replace(b"\n", b"\r\n"),
    "trailing spaces": lambda pem: pem.replace(b"-----\n", b"-----  \n"),
    "a comment in UTF-8": lambda pem: "Schlüssel für 🚀\n".encode() + pem,
    "no UTF-8": lambda pem: b"caf\xe9\n" + pem,
    "a document end": lambda pem: b"x\n---\n...\n" + pem,
}


@pytest.mark.parametrize("form", ["yaml", "json"])
@pytest.mark.parametrize("variant", COMMENTED)
def test_pem_arrives_byte_for_byte(variant: str, form: str) -> None:
    cert, key = COMMENTED[variant](a_pair().cert), COMMENTED[variant](a_pair().key)
    files = files_of(form, tls_crt=cert, tls_key=key)
    pair = envoy_secret(files[f"demo_web-tls.{form}"].content, form).tls_certificate
    assert source_bytes(pair.certificate_chain) == cert
    assert source_bytes(pair.private_key) == key


@given(
    before=st.text(alphabet=st.characters(codec="utf-8", exclude_characters="-"), max_size=40),
    after=st.binary(max_size=40).filter(lambda text: b"-" not in text),
)
@settings(max_examples=200, deadline=None)
def test_any_text_around_the_blocks_arrives(before: str, after: bytes) -> None:
    ca = before.encode() + b"\n" + a_pair().cert + after
    content = files_of(ca_crt=ca)["demo_web-tls_ca.yaml"].content
    assert source_bytes(envoy_secret(content).validation_context.trusted_ca) == ca


# -- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["p256", "p384", "rsa2048", "rsa1024"])
def test_keys_that_envoy_may_take_are_let_through(kind: str) -> None:
    """Even weak ones: Envoy says what is too weak, and says it to Envoy's operator."""
    assert files_of(tls_crt=a_pair(kind).cert, tls_key=a_pair(kind).key)


def test_the_older_key_formats() -> None:
    for kind in ("p256", "rsa2048"):
        key = pem_of(key_of(kind), form="TraditionalOpenSSL")
        assert b"BEGIN PRIVATE KEY" not in key
        assert files_of(tls_crt=a_pair(kind).cert, tls_key=key)


def test_a_pair_that_does_not_match() -> None:
    other = ec.generate_private_key(ec.SECP256R1())
    problem = problems_of(tls_crt=a_pair().cert, tls_key=pem_of(other))
    assert problem.endswith(f"{MISMATCH} (KEY_VALUES_MISMATCH)")
    problem = problems_of(tls_crt=a_pair().cert, tls_key=a_pair("rsa2048").key)
    reasons = ("KEY_TYPE_MISMATCH", "NO_CERTIFICATE_ASSIGNED")
    assert problem.endswith(tuple(f"{MISMATCH} ({reason})" for reason in reasons))


@pytest.mark.parametrize("form", ["PKCS8", "TraditionalOpenSSL"])
def test_an_encrypted_key_is_refused_and_nobody_is_asked(form: str) -> None:
    key = pem_of(key_of("rsa2048"), b"open sesame", form)
    problem = problems_of(tls_crt=a_pair("rsa2048").cert, tls_key=key)
    assert problem.endswith("tls.key is encrypted, and Envoy is given no passphrase")


def test_halves_and_nothing() -> None:
    assert "tls.crt without tls.key" in problems_of(tls_crt=a_pair().cert)
    assert "tls.key without tls.crt" in problems_of(tls_key=a_pair().key)
    assert "none of the keys" in problems_of()
    assert "none of the keys" in problems_of(password=b"geheim")


def test_garbage() -> None:
    cert, key = a_pair()
    for bad in (b"garbage", cert[:-40], cert + cert[:99], cert.replace(b"\nMII", b"\n!II"),
                block(b"\x30\x03abc"), cert + block(b"abc"), cert.replace(b"\n", b"\n ")):
        assert problems_of(tls_crt=bad, tls_key=key).endswith(f"tls.crt {UNREADABLE}")
    assert f"{MISMATCH} (not readable)" in problems_of(tls_crt=cert, tls_key=b"garbage")
    assert f"{MISMATCH} (" in problems_of(tls_crt=cert, tls_key=key[:-60])
    assert f"{MISMATCH} (not readable)" in problems_of(tls_crt=cert, tls_key=cert)
    assert f"ca.crt {UNREADABLE}" in problems_of(ca_crt=b"\xff\x00")


def test_one_bad_half_keeps_the_other_back() -> None:
    """New CA beside old certificate is a mixture that nobody wrote: no file, so the last ones."""
    assert "tls.key" in problems_of(
        tls_crt=a_pair().cert, tls_key=a_pair("p384").key, ca_crt=a_chain()[2]
    )
    assert "ca.crt" in problems_of(tls_crt=a_pair().cert, tls_key=a_pair().key, ca_crt=b"x")


def test_a_private_key_among_certificates_is_refused() -> None:
    """Envoy's /config_dump redacts `private_key` only."""
    cert, key = a_pair()
    assert "tls.crt holds a private key" in problems_of(tls_crt=cert + key, tls_key=key)
    assert "ca.crt holds a private key" in problems_of(ca_crt=key + cert)


def test_objects_that_are_no_secrets() -> None:
    with pytest.raises(ValueError, match=r"^tls.key is not base64$"):
        loader.secret_from({**api_object(), "data": {"tls.key": "c2VjcmV0!"}})
    with pytest.raises(ValueError, match="is not base64"):
        loader.secret_from({**api_object(), "data": {"tls.key": 17}})
    for name in ("../etc", "a/b", "", "A", "x" * 254, "a\n"):
        obj = {**api_object(), "metadata": {"namespace": "demo", "name": name}}
        with pytest.raises(ValueError, match="without a valid namespace and name"):
            loader.secret_from(obj)
    for broken in ({}, {"metadata": None}, {"metadata": [1]}):
        with pytest.raises(ValueError, match="without a valid"):
            loader.secret_from(broken)
    for nothing in (None, "x"):
        with pytest.raises(ValueError, match="none of the keys"):
            loader.secret_from({**api_object(), "data": nothing})


def test_base64_with_line_breaks_as_in_a_file_by_hand() -> None:
    obj = api_object()
    obj["data"]["ca.crt"] = base64.encodebytes(a_pair().cert).decode()
    [file] = loader.secret_from(obj).files.values()
    trusted = envoy_secret(file.content).validation_context.trusted_ca
    assert source_bytes(trusted) == a_pair().cert


def test_a_name_too_long_for_a_file() -> None:
    obj = api_object(f"{'n' * 63}/{'x' * 253}", ca_crt=a_pair().cert)
    with pytest.raises(ValueError, match="too long for a file name"):
        loader.secret_from(obj)


def test_the_key_touches_no_disk() -> None:
    """Every file that is opened for writing while a pair is checked is anonymous memory."""
    script = """
import base64, json, sys
opened = []
sys.addaudithook(lambda event, args: opened.append(args) if event == "open" else None)
import loader
secret = json.load(sys.stdin)
opened.clear()
files, problems = loader.secret_from(secret)
assert files and not problems
import os
for path, mode, flags in opened:
    writing = mode not in (None, "r", "rb") or (flags or 0) & 3
    assert isinstance(path, int) or not writing, (path, mode)
"""
    chain, key, ca = a_chain()
    subprocess.run(
        [sys.executable, "-c", script],
        input=json.dumps(api_object(tls_crt=chain, tls_key=key, ca_crt=ca)).encode(),
        env={**os.environ, "PYTHONPATH": os.path.dirname(loader.__file__)},
        check=True,
    )


def test_no_descriptor_is_left() -> None:
    before = len(os.listdir("/proc/self/fd"))
    problems_of(tls_crt=a_pair().cert, tls_key=b"garbage")
    files_of(tls_crt=a_pair().cert, tls_key=a_pair().key)
    assert len(os.listdir("/proc/self/fd")) == before


def test_without_anonymous_memory_envoy_judges(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "memfd_create")
    assert files_of(tls_crt=a_pair().cert, tls_key=a_pair("p384").key)
    assert "holds no PEM certificate" in problems_of(tls_crt=b"x", tls_key=b"y")


# -- certificates ----------------------------------------------------------------------------------


def block(der: bytes) -> bytes:
    body = base64.encodebytes(der)
    return b"-----BEGIN CERTIFICATE-----\n" + body + b"-----END CERTIFICATE-----\n"


def test_the_authorities_of_this_machine_are_accepted() -> None:
    path = "/etc/ssl/certs/ca-certificates.crt"
    if not os.path.exists(path):
        pytest.skip("no CA bundle here")
    with open(path, "rb") as file:
        assert files_of(ca_crt=file.read())


@given(at=st.integers(0, 10_000), value=st.integers(0, 255))
@settings(max_examples=200, deadline=None)
def test_a_damaged_certificate_is_accepted_or_a_problem(at: int, value: int) -> None:
    der = bytearray(base64.b64decode(b"".join(a_pair().cert.split(b"\n")[1:-2])))
    der[at % len(der)] = value
    said = f"ca.crt {UNREADABLE}"
    try:
        assert files_of(ca_crt=block(bytes(der)))
    except ValueError as error:
        said = str(error)
    assert said == f"ca.crt {UNREADABLE}"


# -- what is never shown -------------------------------------------------------------------------


def leaks(text: str, *secrets: bytes) -> bool:
    """Whether 12 bytes in a row of a secret are in a text, plainly or in base64."""
    forms = [form for secret in secrets for form in (secret, base64.b64encode(secret))]
    windows = (form[at : at + 12] for form in forms for at in range(max(1, len(form) - 11)))
    return any(window.decode("latin-1") in text for window in windows if len(window) == 12)


@given(
    cert=st.sampled_from(["", "good", "cut", "noise"]),
    key=st.sampled_from(["", "good", "cut", "other", "encrypted", "noise"]),
    ca=st.sampled_from(["", "good", "cut", "noise"]),
    noise=st.binary(min_size=16, max_size=200),
    damage=st.sampled_from(["", "base64"]),
)
@settings(max_examples=300, deadline=None)
def test_no_text_shows_a_key(cert: str, key: str, ca: str, noise: bytes, damage: str) -> None:
    pair = a_pair()
    forms = {
        "": b"",
        "good": pair.key,
        "cut": pair.key[:-40],
        "other": a_pair("p384").key,
        "encrypted": encrypted_key(),
        "noise": noise,
    }
    certs = {"": b"", "good": pair.cert, "cut": pair.cert[:-40], "noise": noise}
    obj = api_object(tls_crt=certs[cert], tls_key=forms[key], ca_crt=certs[ca])
    if damage:
        obj["data"]["tls.key"] += "!"
    said = []
    try:
        found = loader.secret_from(obj)
        files = found.files
        said += [repr(found), str(found), f"{found}", *found.warnings, *files]
        said += [loader.redacted(file.content).decode() for file in files.values()]
        said += [loader.redacted(file.content, b"old").decode() for file in files.values()]
    except ValueError as error:
        said += [str(error), repr(error), str(error.__cause__)]
    secrets = [body for body in (forms[key].split(b"-----")[2:3] or [forms[key]]) if body]
    assert not leaks("\n".join(said), *secrets)


@functools.cache
def encrypted_key() -> bytes:
    return pem_of(key_of("p256"), b"open sesame")


@pytest.mark.parametrize(
    "content",
    [
        b"inline_string: |\n  -----BEGIN RSA PRIVATE KEY-----\n",
        *(b"inline_bytes: " + base64.b64encode(b"x" * more + b"-----BEGIN EC PRIVATE KEY-----\nMHc")
          for more in range(6)),
        b'{"@type": "x/envoy.extensions.transport_sockets.tls.v3.Secret", "generic_secret": 1}',
    ],
)
def test_secrets_in_the_files_of_configmaps_are_redacted_too(content: bytes) -> None:
    assert loader.holds_secret(content)
    assert not loader.holds_secret(b"sds_config: tls.v3.SdsSecretConfig")


def test_no_core_file_holds_a_key() -> None:
    pid = os.fork()
    if pid == 0:
        try:
            resource.setrlimit(resource.RLIMIT_CORE, (resource.RLIM_INFINITY,) * 2)
        except ValueError:
            pass
        loader.no_core_dumps()
        os._exit(0 if resource.getrlimit(resource.RLIMIT_CORE)[0] in (0, 1) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


# -- the page about security ---------------------------------------------------------------------


def test_the_role_of_the_documentation_is_enough(
    api: ApiServer, run_loader: RunLoader, out: Path
) -> None:
    page = (Path(__file__).parents[1] / "docs" / "security.md").read_text()
    (block_of_yaml,) = re.findall(r"```yaml\n(.*?)```", page, re.S)
    role = yaml.safe_load(block_of_yaml)
    api.rules = [
        Rule(rule["verbs"], rule["resources"], role["metadata"]["namespace"], rule["resourceNames"])
        for rule in role["rules"]
    ]
    api.configmap("demo", "envoy-xds", {"rds.yaml": "resources: []\n"})
    api.secret("demo", "web-tls", {"tls.crt": a_pair().cert, "tls.key": a_pair().key})
    api.secret("demo", "other", {"tls.crt": a_pair().cert, "tls.key": a_pair().key})
    done = run_loader("--onetime", "--configmap", "envoy-xds", "--secret", "web-tls")
    assert done.returncode == 0, done.stderr
    assert (out / "current" / "sds" / "demo_web-tls.yaml").exists()
    done = run_loader("--onetime", "--secret", "other")
    assert done.returncode == 1
    assert "secrets" in done.stderr


def test_modes_are_those_of_the_documentation(
    api: ApiServer, run_loader: RunLoader, out: Path
) -> None:
    """Whatever the umask, in every directory that a key passes through, and no key elsewhere."""
    api.configmap("demo", "envoy-xds", {"rds.yaml": "resources: []\n"})
    for number, (one, mode) in enumerate((("p256", "0600"), ("p384", "0600"), ("p256", "0640"))):
        keys = {"tls.crt": a_pair(one).cert, "tls.key": a_pair(one).key, "ca.crt": a_chain()[2]}
        api.secret("demo", "web-tls", keys, type="kubernetes.io/tls")
        before = os.umask(0o000 if number else 0o077)
        try:
            done = run_loader(
                *("--onetime", "--configmap", "envoy-xds", "--secret", "web-tls"),
                *("--secret-mode", mode),
            )
        finally:
            os.umask(before)
        assert done.returncode == 0, done.stderr
        assert not leaks(done.stderr + done.stdout, a_pair(one).key.split(b"-----")[2])
        for path in out.rglob("*"):
            if path.is_symlink():
                continue
            found = path.stat().st_mode & 0o777
            if path.is_dir():
                assert found == 0o755
            elif path.parent.name == "sds":
                assert found in (0o600, int(mode, 8))
            else:
                assert found == 0o644
                assert b"PRIVATE" not in path.read_bytes()
        for name in ("demo_web-tls.yaml", "demo_web-tls_ca.yaml"):
            found = (out / "current" / "sds" / name).stat().st_mode & 0o777
            assert found == int(mode, 8)


def test_previews_and_differences_are_redacted(
    api: ApiServer, run_loader: RunLoader, out: Path
) -> None:
    arguments = ("--secret", "web-tls")
    for kind, changed in (("p256", False), ("p384", True)):
        keys = {"tls.crt": a_pair(kind).cert, "tls.key": a_pair(kind).key}
        api.secret("demo", "web-tls", keys, type="kubernetes.io/tls")
        for more in (("--dry-run",), ("--dry-run", "--diff"), ("--dry-run", "--format", "json")):
            done = run_loader(*arguments, *more, "--log-level", "debug")
            assert done.returncode == 0, done.stderr
            assert "[redacted: " in done.stdout
            assert (", changed]" in done.stdout) == (changed and "--diff" in more)
            shown = done.stdout + done.stderr
            assert not leaks(shown, *(block for block in a_pair(kind).key.split(b"-----")[2:3]))
            assert "PRIVATE" not in shown
        assert run_loader("--onetime", *arguments).returncode == 0
