import pathlib

import pytest

from pippin.core.errors import ConfigError
from pippin.serve.options import Options, check_security, parse_options

PEM = pathlib.Path("x.pem")


def test_the_defaults_serve_this_machine_only():
    options = parse_options([])
    assert options == Options() and options.address == "127.0.0.1:50051"
    assert parse_options(["--host", "::1", "--port", "7"]).address == "[::1]:7"


def test_flags_arrive():
    options = parse_options(["--max-tokens", "9", "--grace", "3.5", "--tokens", "t", "--reflection"])
    assert (options.limits.max_tokens, options.grace_s, options.reflection) == (9, 3.5, True)
    assert options.tokens == pathlib.Path("t")


@pytest.mark.parametrize(
    "argv", [["--port", "70000"], ["--port", "x"], ["--max-tokens", "0"], ["--grace", "nan"], ["--no-such"]]
)
def test_a_wrong_flag_is_one_line(argv, capsys):
    with pytest.raises(SystemExit) as end:
        parse_options(argv)
    assert end.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("server: error: ")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "nobody is asked"),
        ({"tls_cert": PEM, "tls_key": PEM}, "nobody is asked"),
        ({"tokens": PEM}, "in clear"),
        ({"tls_cert": PEM}, "go together"),
        ({"client_ca": PEM}, "--client-ca needs"),
    ],
)
def test_what_other_machines_reach_is_protected(fields, message):
    with pytest.raises(ConfigError, match=message):
        check_security(Options(**fields), ["0.0.0.0:1"])


@pytest.mark.parametrize(
    "fields",
    [
        {"insecure": True},
        {"tokens": PEM, "tls_cert": PEM, "tls_key": PEM},
        {"client_ca": PEM, "tls_cert": PEM, "tls_key": PEM},
    ],
)
def test_what_is_protected_or_trusted_is_served(fields):
    check_security(Options(**fields), ["0.0.0.0:1"])


def test_this_machine_needs_no_protection():
    check_security(Options(), [])
