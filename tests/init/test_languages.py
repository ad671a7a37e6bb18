"""The languages of columns, as `sevenfold init` shows them."""

from __future__ import annotations

import pytest

from sevenfold.init.languages import languages

TEXTS = {
    "en": "The committee decided that the meeting should take place on the following Tuesday.",
    "de": "Der Ausschuss hat beschlossen, dass die Sitzung am folgenden Dienstag stattfindet.",
    "fr": "La commission a décidé que la réunion aurait lieu le mardi suivant, à neuf heures.",
    "es": "La comisión decidió que la reunión debía celebrarse el martes siguiente por la tarde.",
    "ru": "Комиссия решила, что заседание состоится в следующий вторник утром.",
    "ja": "委員会は会議を次の火曜日に開くことを決めました。",
    "zh": "委员会决定会议在下星期二上午举行。",
    "ko": "위원회는 회의를 다음 화요일에 열기로 결정했습니다.",
}


@pytest.mark.parametrize("name", TEXTS)
def test_one_language(name: str) -> None:
    assert languages([TEXTS[name]] * 3) == name
    chat = [{"role": "user", "content": TEXTS[name]}, {"role": "assistant", "content": ""}]
    assert languages([chat]) == name


def test_several_languages() -> None:
    texts = [TEXTS["de"]] * 6 + [TEXTS["en"]] * 4
    assert languages(texts) == "de 60%, en 40%"
    assert languages([TEXTS["en"]] * 99 + [TEXTS["fr"]]) == "en"


@pytest.mark.parametrize("values", [[], [None], [1, 2.5], ["yes", "no"], ["1234567890 " * 9]])
def test_no_language(values: list[object]) -> None:
    assert languages(values) == ""
