"""What a run adds to the report of its stage."""

import re
from pathlib import Path

import pytest

from flows.reports.metrics_table import four_digits
from flows.reports.rows import student_title, with_deviation
from flows.reports.run_facts import COMPARISON, LINEAGE, RUN, Measured, write_run_report
from flows.tracking.gpu_usage import ENERGY, GPU_HOURS, in_words

TEMPLATE = Path(__file__).parents[3] / "flows" / "reports" / "templates" / "report.html"
OWN = {"nfe_1/fid": 2.5, "nfe_1/recall": 0.5, "nfe_1/fid-spread": 1.0}


def page_of(folder, facts=None, **further):
    write_run_report(TEMPLATE, folder / "reports" / "tiny.html", facts or {}, **further)
    return (folder / "reports" / "tiny.html").read_text()


def test_the_template_has_the_places_and_what_is_put_there_is_text(tmp_path):
    facts = {"run": "tiny <b>", **in_words({GPU_HOURS: 1.25, ENERGY: 0.5})}
    page = page_of(tmp_path, facts, commands=["cm run <i> & 'x'"])
    assert [TEMPLATE.read_text().count(place) for place in (RUN, COMPARISON, LINEAGE)] == [1, 1, 1]
    assert RUN not in page and page.count("<dt>GPU-hours</dt><dd>1.25</dd>") == 1
    assert "<dd>0.5 kWh</dd>" in page and "tiny &lt;b&gt;" in page and "<pre>cm run &lt;i&gt; &amp;" in page


def test_the_lineage_is_drawn_in_the_page(tmp_path):
    assert '<svg viewBox="0 0 1 1"/>' in page_of(tmp_path, lineage='<svg viewBox="0 0 1 1"/>')
    assert "Lineage" not in page_of(tmp_path), "nothing known, no heading"


def test_what_was_not_measured_is_said_to_be_so():
    assert in_words({}) == {"GPU-hours": "none", "Energy": "not measured"}
    assert in_words({GPU_HOURS: 2.0}) == {"GPU-hours": "2", "Energy": "not measured"}


def test_numbers_of_earlier_students_stand_beside_this_ones_with_who_is_better(tmp_path):
    champion = Measured("champion", "version 3 <b>", {"nfe_1/fid": 2.25, "nfe_1/recall": 0.4})
    previous = Measured("previous", "version 7", {"nfe_1/fid": 2.5})
    deviations = {"nfe_1/fid": 0.08, "nfe_1/recall": 0.04}
    page = page_of(tmp_path, own=OWN, deviations=deviations, others=[champion, previous])
    section = page[page.index("Against earlier students") :].partition("</section>")[0]
    fid, recall = section.split('<th scope="row">')[1:]
    assert "<b>2.500</b><small> ±&nbsp;0.080" in fid and "2.250 " in fid and 'class="worse"' in fid
    assert 'class="alike"' in fid, "the previous one's is equal"
    assert "0.4000 " in recall and "<td>–</td>" in recall, "the previous has no recall"
    assert 'class="alike"' in recall, "0.1 apart, but each deviates by 0.04"
    surer = page_of(tmp_path, own=OWN, deviations={"nfe_1/recall": 0.03}, others=[champion])
    assert 'class="better"' in surer.partition("recall ↑")[2]
    fid = surer.partition("FID ↓")[2].partition("recall")[0]
    assert "2.250" in fid and not re.search("better|worse|clear", fid), "how it deviates is not known: no verdict"
    assert "version 3 &lt;b&gt;" in section and "spread" not in section


@pytest.mark.parametrize("others", [[], [Measured("champion", "", {"nfe_8/fid": 1.0})]])
def test_without_a_number_to_compare_there_is_no_comparison(tmp_path, others):
    assert "earlier students" not in page_of(tmp_path, own=OWN, others=others)


def test_numbers_have_four_digits():
    found = [four_digits(value) for value in (2.66449, 68.9312, 0.0980, 1347.2, 0, 0.5, 12345.6, 0.00001)]
    assert found == ["2.664", "68.93", "0.0980", "1,347", "0.000", "0.5000", "12,346", "0.0000"]
    assert with_deviation(68.9312, 0.456) == "68.93 ± 0.46" and with_deviation(1.0, 0.0) == "1.000"


def test_rows_of_the_student_in_words():
    words = {
        "nfe_1": "one call",
        "nfe_2_at_0.8_0.2_ema1": "two calls, σ 0.8, 0.2, EMA 1",
        "nfe_35": "35 calls",
        "nfe_4_ema2": "four calls, EMA 2",
        "nfe_1_width_0.06": "one call, EMA of width 0.06",
        "nfe_2_ema1_guidance_2.5": "two calls, EMA 1, guidance 2.5",
    }
    assert {name: student_title(name) for name in words} == words
