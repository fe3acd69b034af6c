from dataclasses import replace
from fractions import Fraction
from http import HTTPStatus

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from wsserver import limits
from wsserver.config import Config
from wsserver.limits import Account, Accounts, Bill, Owner, TokenBucket, address_of, bucket, weight

EIGHTHS = st.integers(0, 40).map(lambda n: n / 8)  # of a second: what floats add exactly
# What is asked of a bucket: after how many seconds, how much, and whether it is taken whatever there is.
ASKED = st.lists(st.tuples(EIGHTHS, st.integers(1, 5), st.booleans()))
CONFIG = Config(
    max_connections=5,
    max_connections_per_address=3,
    handshakes_per_second=1.0,
    max_requests_per_key=4,
    max_queued_per_key=2,
    tokens_per_minute=60,
)
A, B = Owner("address", "192.0.2.1"), Owner("key", "b")


def level(rate: int, burst: int, spent: list[tuple[float, int]], now: float) -> Fraction:
    """Give what is in a bucket, by going through all that was ever taken."""
    left, last = Fraction(burst), Fraction(0)
    for at, amount in [*spent, (now, 0)]:
        left = min(left + (Fraction(at) - last) * rate, Fraction(burst)) - amount
        last = Fraction(at)
    return left


@given(st.sampled_from([1, 2, 4, 8]), st.integers(1, 20), ASKED)
def test_a_bucket_gives_what_its_history_allows(rate: int, burst: int, asked: list[tuple[float, int, bool]]) -> None:
    tested, spent, now = TokenBucket(rate, burst), list[tuple[float, int]](), 0.0
    for later, amount, at_once in asked:
        now += later
        there = level(rate, burst, spent, now)
        if at_once:
            tested.spend(amount, now)
            spent.append((now, amount))
            continue
        seconds = tested.take(now, amount)
        assert seconds == max(1 - there, 0) / rate
        if not seconds:
            spent.append((now, amount))


@given(st.sampled_from([0.5, 1, 7, 50]), st.integers(1, 9), st.lists(EIGHTHS))
def test_in_no_time_more_is_taken_one_by_one_than_the_burst_and_the_rate_allow(
    rate: float, burst: int, waits: list[float]
) -> None:
    tested, now, taken = TokenBucket(rate, burst), 0.0, list[float]()
    for later in waits:
        now += later
        if not tested.take(now):
            taken.append(now)
    for first, start in enumerate(taken):
        for last, end in enumerate(taken[first:], first):
            assert last - first + 1 <= burst + rate * (end - start) + 1e-6


@given(ASKED)
def test_after_the_seconds_it_says_a_bucket_gives(asked: list[tuple[float, int, bool]]) -> None:
    tested, now = TokenBucket(2, 3), 0.0
    for later, amount, _ in asked:
        now += later + tested.wait(now + later)
        assert tested.take(now, amount) == 0


def test_a_clock_that_was_read_late_takes_nothing_back() -> None:
    tested = TokenBucket(1, 2)
    assert [tested.take(10.0), tested.take(9.0), tested.take(8.0), tested.take(11.0)] == [0, 0, 1, 0]


def test_a_bucket_of_less_than_one_holds_one() -> None:
    slow = bucket(0.01)
    assert slow.take(0.0) == 0
    assert slow.take(0.0) == pytest.approx(100)


def test_ten_seconds_worth_may_come_at_once() -> None:
    fast = bucket(3.0)
    assert [bool(fast.take(0.0)) for _ in range(31)] == [False] * 30 + [True]


@pytest.mark.parametrize(
    ("text", "counts"),
    [
        ("", 1),
        (4095 * "x", 1),
        (4096 * "x", 2),
        (255 * "[" + 1000 * "]", 1),
        (128 * "[{", 2),
        (4096 * "{", 1 + 1 + 16),
    ],
)
def test_a_message_counts_once_more_for_every_4_kib_and_for_every_256_brackets(text: str, counts: int) -> None:
    assert weight(text) == counts


# Accounts.


def test_connections_of_one_address_are_turned_away_at_its_bound_and_of_all_at_theirs() -> None:
    accounts = Accounts(CONFIG)
    assert [accounts.enter(A, 0.0) for _ in range(4)] == [None, None, None, HTTPStatus.TOO_MANY_REQUESTS]
    assert [accounts.enter(B, 0.0) for _ in range(3)] == [None, None, HTTPStatus.SERVICE_UNAVAILABLE]
    accounts.leave(A)
    assert [accounts.enter(B, 0.0), accounts.enter(A, 0.0)] == [None, HTTPStatus.SERVICE_UNAVAILABLE]


def test_arrivals_are_counted_by_the_second_also_those_of_connections_that_have_gone() -> None:
    accounts = Accounts(CONFIG)
    for _ in range(100):
        assert accounts.enter(A, 0.0) is None
        accounts.leave(A)
    assert accounts.enter(A, 0.05) is HTTPStatus.TOO_MANY_REQUESTS
    assert accounts.enter(A, 0.1) is None
    assert accounts.enter(B, 1.0) is None


def test_a_request_too_many_is_told_whether_too_many_are_active_or_wait() -> None:
    account = Account(CONFIG)
    bills = [Bill(account), Bill(account)]
    assert "2 requests of this client wait" in (account.too_many() or "")
    for bill in bills:
        bill.start()
    assert account.too_many() is None
    bills += [Bill(account), Bill(account)]
    assert "4 requests of this client are active" in (account.too_many() or "")
    bills[0].settle()
    bills[2].settle()
    assert account.too_many() is None


def test_a_prompt_that_was_read_is_charged_once_whether_the_request_starts_or_not() -> None:
    account = Account(CONFIG)
    for starts in (False, True):
        bill = Bill(account)
        bill.charge(25, 0.0)
        if starts:
            bill.start()
            bill.charge(35, 0.0)
        else:
            bill.charge(0, 0.0)  # the end of what never started tells of no tokens
        bill.settle()
        assert account.tokens.wait(0.0) == (1 if starts else 0)


def test_a_request_is_charged_once_for_every_token() -> None:
    account = Account(CONFIG)
    bill = Bill(account)
    bill.start()
    for total in (30, 40, 40, 59):
        bill.charge(total, 0.0)
        assert account.tokens.wait(0.0) == 0
    bill.charge(69, 0.0)
    assert account.tokens.wait(0.0) == 10
    bill.settle()
    bill.settle()
    assert (account.requests, account.queued) == (0, 0)


class Clients(RuleBasedStateMachine):
    """Connections and requests of a few clients, counted by lists; what is remembered is bounded by four."""

    def __init__(self) -> None:
        super().__init__()
        self.remembered, limits.REMEMBERED = limits.REMEMBERED, 4
        self.accounts = Accounts(replace(CONFIG, handshakes_per_second=1e9))
        self.connections: list[Owner] = []
        self.bills: list[tuple[Owner, Bill]] = []
        self.waiting: list[Bill] = []
        self.most = 0

    def teardown(self) -> None:
        limits.REMEMBERED = self.remembered

    @rule(name=st.sampled_from("abcdefgh"))
    def enter(self, name: str) -> None:
        owner = Owner("address", name)
        full = len(self.connections) == CONFIG.max_connections
        many = self.connections.count(owner) == CONFIG.max_connections_per_address
        refusal = self.accounts.enter(owner, 0.0)
        assert refusal == (HTTPStatus.SERVICE_UNAVAILABLE if full else HTTPStatus.TOO_MANY_REQUESTS if many else None)
        if refusal is None:
            self.connections.append(owner)

    @precondition(lambda self: self.connections)
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        owner = data.draw(st.sampled_from(self.connections))
        self.connections.remove(owner)
        self.accounts.leave(owner)

    @rule(name=st.sampled_from("abcdefgh"))
    def ask(self, name: str) -> None:
        owner = Owner("address", name)
        mine = [bill for whose, bill in self.bills if whose == owner]
        too_many = (
            len(mine) >= CONFIG.max_requests_per_key or len(set(mine) & set(self.waiting)) >= CONFIG.max_queued_per_key
        )
        account = self.accounts.of(owner)
        assert bool(account.too_many()) == too_many
        if not too_many and len(self.bills) < 4:
            bill = Bill(account)
            self.bills.append((owner, bill))
            self.waiting.append(bill)

    @precondition(lambda self: self.waiting)
    @rule(data=st.data())
    def start(self, data: st.DataObject) -> None:
        bill = data.draw(st.sampled_from(self.waiting))
        self.waiting.remove(bill)
        bill.start()

    @precondition(lambda self: self.bills)
    @rule(data=st.data())
    def settle(self, data: st.DataObject) -> None:
        owner, bill = data.draw(st.sampled_from(self.bills))
        self.bills.remove((owner, bill))
        self.waiting = [other for other in self.waiting if other is not bill]
        bill.settle()

    @invariant()
    def whoever_has_something_here_is_remembered_and_few_others(self) -> None:
        users = {*self.connections, *(owner for owner, _ in self.bills)}
        self.most = max(self.most, len(users))
        assert len(self.accounts) <= max(4, self.most + 1)
        assert all(self.accounts.of(user).used for user in users)
        assert self.accounts.connections == len(self.connections)


TestClients = Clients.TestCase


# Addresses.


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("192.0.2.1", "192.0.2.1", True),
        ("192.0.2.1", "192.0.2.2", False),
        ("::ffff:192.0.2.1", "192.0.2.1", True),
        ("2001:db8::1", "2001:db8::ffff:1", True),
        ("2001:db8::1", "2001:db8:0:1::1", False),
        ("fe80::1%eth0", "fe80::2%eth1", True),
    ],
)
def test_one_client_has_one_address_whichever_of_its_network_it_takes(one: str, other: str, same: bool) -> None:
    assert (address_of((one, 1)) == address_of((other, 2, 0, 0))) is same


def test_a_key_that_is_named_like_an_address_is_another_client() -> None:
    assert address_of(("192.0.2.1", 1)) != Owner("key", "192.0.2.1")


@pytest.mark.parametrize("peername", [None, "", b"", ("not an address", 1)])
def test_whoever_has_no_address_has_an_account_all_the_same(peername: object) -> None:
    assert address_of(peername).kind == "address"
