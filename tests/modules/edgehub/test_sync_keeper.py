from modules.edgehub.sync_keeper import LATE, Question, SyncKeeper


def ask(
    keeper: SyncKeeper[str],
    name: str,
    *,
    seconds: float = 60.0,
    operation: str = "query",
    resource: str = "r",
    now: float = 0.0,
) -> bool:
    return keeper.register(
        name,
        f"asker of {name}",
        name.encode(),
        operation=operation,
        resource=resource,
        seconds=seconds,
        now=now,
    )


def test_the_answer_goes_to_who_asked_and_only_once() -> None:
    keeper: SyncKeeper[str] = SyncKeeper()
    assert ask(keeper, "q")
    question = keeper.answer("q")
    assert isinstance(question, Question)
    assert question.token == "asker of q"
    assert keeper.answer("q") is None
    assert len(keeper) == 0


def test_an_answer_to_nobody_is_an_ordinary_message() -> None:
    keeper: SyncKeeper[str] = SyncKeeper()
    assert keeper.answer("unknown") is None


def test_a_reply_that_names_no_question_is_of_the_only_one_about_its_resource() -> None:
    keeper: SyncKeeper[str] = SyncKeeper()
    ask(keeper, "a", resource="one")
    ask(keeper, "b", resource="two")
    ask(keeper, "c", resource="two")
    question = keeper.answer_about("one")
    assert question is not None
    assert question.token == "asker of a"
    assert keeper.answer_about("one") is None
    assert keeper.answer_about("two") is None, "it could be either"
    assert len(keeper) == 2


def test_each_question_has_its_own_time_and_its_answer_is_late_after_it() -> None:
    keeper: SyncKeeper[str] = SyncKeeper()
    ask(keeper, "long", seconds=60.0)
    ask(keeper, "short", seconds=1.0)
    assert keeper.next_deadline() == 1.0
    assert keeper.expire(now=0.9) == []
    assert [question.id for question in keeper.expire(now=1.0)] == ["short"]
    assert keeper.next_deadline() == 60.0
    assert keeper.answer("short") is LATE
    assert isinstance(keeper.answer("long"), Question)
    assert keeper.next_deadline() is None


def test_an_answered_question_does_not_expire() -> None:
    keeper: SyncKeeper[str] = SyncKeeper()
    ask(keeper, "q", seconds=1.0)
    keeper.answer("q")
    assert keeper.expire(now=100.0) == []
    assert keeper.answer("q") is None


def test_the_same_id_asked_again_has_its_new_time() -> None:
    keeper: SyncKeeper[str] = SyncKeeper()
    ask(keeper, "q", seconds=1.0)
    keeper.answer("q")
    ask(keeper, "q", seconds=10.0)
    assert keeper.expire(now=5.0) == []
    assert keeper.is_open("q")
    assert [question.id for question in keeper.expire(now=10.0)] == ["q"]


def test_no_more_than_its_capacity_and_no_id_twice() -> None:
    keeper: SyncKeeper[str] = SyncKeeper(capacity=2)
    assert ask(keeper, "a")
    assert not ask(keeper, "a")
    assert not ask(keeper, "")
    assert ask(keeper, "b")
    assert not ask(keeper, "c")


def test_the_memory_of_late_questions_is_bounded() -> None:
    keeper: SyncKeeper[str] = SyncKeeper(capacity=2)
    for name in "abc":
        ask(keeper, name, seconds=1.0)
        keeper.expire(now=1.0)
    assert [keeper.answer(name) for name in "abc"] == [None, LATE, LATE]


def test_questions_that_change_nothing_are_asked_again_over_a_new_link() -> None:
    keeper: SyncKeeper[str] = SyncKeeper()
    ask(keeper, "q1", operation="query")
    ask(keeper, "create", operation="insert")
    ask(keeper, "q2", operation="get")
    assert [question.id for question in keeper.to_ask_again()] == ["q1", "q2"]
    assert len(keeper) == 3, "all of them go on waiting"
