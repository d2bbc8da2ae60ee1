"""Where the trainings of a recipe start: which needs the teacher or the base, and what fits together."""

from collections.abc import Mapping

from cm_core.model import CONSISTENCY_FUNCTIONS
from cm_core.noise import Noise
from cm_core.sampling import check_levels
from flows.stages.sample import Sample
from flows.stages.student import Student
from flows.stages.teacher import Teacher


def check_starts(teacher: Teacher | None, students: Mapping[str, Student]) -> None:
    """Raise ValueError, one line, unless the student, and its base if there is one, have what they start from."""
    for role, section in students.items():
        kind, has_base = section.method.kind, role == "student" and "base" in students
        if section.needs_base and not has_base:
            if role == "base":
                raise ValueError(f"base.method.kind={kind} needs a base itself; train base with ect, ict, cd or cmt")
            raise ValueError(
                f"student.method.kind={kind} trains on from a consistency function, and base is null; "
                "add one, such as base.method.kind=ect"
            )
        if teacher is not None or not section.uses_teacher(has_base=has_base):
            continue
        if section.method.needs_teacher:
            raise ValueError(f"{role}.method.kind={kind} distils a teacher, and teacher is null; train one or use ct")
        raise ValueError(
            f"the {role}'s initial weights are the teacher's (kind={kind}), and teacher is null; train one, or set "
            f"{role}.init_from: random"
        )
    if "base" in students:
        _check_base(**students)


def _check_base(base: Student, student: Student) -> None:
    """Refuse a base that the student cannot start from, or that nothing would come of."""
    before, after = base.method, student.method
    if student.is_imported:
        raise ValueError("student.weights is set: nothing is trained from the base; set base: null")
    if student.init_from is not None:
        raise ValueError(f"student.init_from={student.init_from}, and the student starts from the base; leave out one")
    if base.evaluate_every:
        raise ValueError(
            f"base.evaluate_every={base.evaluate_every}: only the student's images are measured; set it to 0"
        )
    if "average_velocity" in (before.form, after.form) and before.form != after.form:
        raise ValueError(
            f"base.method.kind={before.kind} and student.method.kind={after.kind}: the network of only one of them has "
            "two times, so that the student cannot start from the base"
        )
    if base.guidance_range is not None and student.guidance_range is None:
        raise ValueError(
            f"base.method.guidance_range={list(base.guidance_range)} makes a network that takes a weight, and the "
            "student's takes none; set student.method.guidance_range, or leave out the base's"
        )
    if not after.needs_base:
        return
    if before.form not in CONSISTENCY_FUNCTIONS:
        raise ValueError(
            f"base.method.kind={before.kind} makes no consistency function, which student.method.kind={after.kind} "
            "trains on from; use ect, ict, cd, ct, scm, cm_inf or cmt"
        )
    if before.form != after.form:
        raise ValueError(f"student.method.form={after.form}, and the base's is {before.form}; set it to {before.form}")


def check_noise_levels(noise: Noise, student: Student, sample: Sample) -> None:
    """Raise ValueError, one line, unless samplers ask the student at noise levels at which it is trained."""
    for mid in (*sample.mid_sigmas, *student.evaluate_mid_sigmas):
        check_levels([noise.sigma_max, *mid], sigma_min=noise.sigma_min)
    if sigma := getattr(student.method, "generator_sigma", None):
        check_levels([sigma], sigma_min=noise.sigma_min)
    if (split := getattr(student.method, "split", None)) is None:
        return
    if not noise.sigma_min < split < noise.sigma_max:
        raise ValueError(
            f"student.method.split={split:g} must lie between sigma_min={noise.sigma_min:g} and "
            f"sigma_max={noise.sigma_max:g}"
        )
    drawn = {"sample.mid_sigmas": sample.mid_sigmas}
    if student.evaluate_every:
        drawn["student.evaluate_mid_sigmas"] = student.evaluate_mid_sigmas
    for key, several in drawn.items():
        if low := [sigma for mid in several for sigma in mid if sigma < split]:
            raise ValueError(
                f"{key}: {low[0]:g} lies below student.method.split={split:g}, where the student is not trained; "
                f"such as [[], [{split:g}]]"
            )
