//! Which slots stay filled between uses.

use crate::build::in_place;
use crate::model::{Model, SectionId, StageSpec};
use crate::placement::Placement;

/// Which slots stay filled from one use of a section to the next: of all waits, the shortest ones
/// first (as Belady's rule would choose, with the future known), while enough slots stay free for
/// what passes through.
pub(crate) fn keeps(
    stages: &[StageSpec],
    model: &Model,
    placement: &Placement,
) -> Vec<Vec<SectionId>> {
    let mut keeps = vec![Vec::new(); stages.len()];
    let mut waits = Vec::new();
    for section in (0..model.sections.len() as u32).map(SectionId) {
        if placement.resident(section) {
            continue;
        }
        let uses: Vec<usize> = (0..stages.len())
            .filter(|s| needs_slot(&stages[*s], placement, section))
            .collect();
        waits.extend(
            uses.windows(2)
                .map(|pair| (pair[1] - pair[0], pair[0], pair[1], section)),
        );
    }
    waits.sort();
    for (_, from, to, section) in waits {
        let class = placement.class(section);
        let (slots, least) = placement.param_slots(class);
        let reserve = (least + u64::from(placement.options().lookahead)).min(slots);
        let room = (slots - reserve) as usize;
        // In the stage after `from` and before `to` the slot is held without being used.
        let held = |stage: usize| {
            keeps[..stage]
                .iter()
                .enumerate()
                .flat_map(|(s, k)| k.iter().map(move |id| (s, id)))
                .filter(|(s, id)| {
                    let next = || next_use(stages, placement, *s, **id);
                    placement.class(**id) == class && next() > stage
                })
                .count()
        };
        if (from + 1..to.max(from + 2)).all(|stage| held(stage) < room) {
            keeps[from].push(section);
        }
    }
    keeps
}

fn next_use(
    stages: &[StageSpec],
    placement: &Placement,
    after: usize,
    section: SectionId,
) -> usize {
    (after + 1..stages.len())
        .find(|s| needs_slot(&stages[*s], placement, section))
        .unwrap_or(stages.len())
}

fn needs_slot(stage: &StageSpec, placement: &Placement, section: SectionId) -> bool {
    stage.reads().any(|read| read == section) && !in_place(stage, placement, section)
}
