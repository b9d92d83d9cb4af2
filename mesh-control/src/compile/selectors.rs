//! Which selectors of many choose some labels, without asking each. Pure.

use std::collections::HashMap;

use crate::objects::Labels;

/// Selectors, each with what it stands for. Each is found by one of its labels: the one that the fewest others have.
pub struct Selectors<'a, T> {
    all: Vec<(&'a Labels, T)>,
    by_label: HashMap<(&'a str, &'a str), Vec<usize>>,
    /// Those that choose everything.
    empty: Vec<usize>,
}

impl<'a, T> Selectors<'a, T> {
    pub fn new(all: Vec<(&'a Labels, T)>) -> Self {
        let mut counts: HashMap<(&str, &str), usize> = HashMap::new();
        for label in all.iter().flat_map(|(selector, _)| pairs(selector)) {
            *counts.entry(label).or_default() += 1;
        }
        let mut by_label: HashMap<(&str, &str), Vec<usize>> = HashMap::new();
        let mut empty = Vec::new();
        for (at, (selector, _)) in all.iter().enumerate() {
            match pairs(selector).min_by_key(|label| counts.get(label)) {
                Some(label) => by_label.entry(label).or_default().push(at),
                None => empty.push(at),
            }
        }
        Self { all, by_label, empty }
    }

    /// What stands for those that choose `labels`, in the order in which they were given.
    pub fn choosing<'s>(&'s self, labels: &Labels) -> impl Iterator<Item = &'s T> + use<'s, 'a, T> {
        let found = pairs(labels).filter_map(|label| self.by_label.get(&label)).flatten();
        let mut chosen: Vec<usize> = found
            .chain(&self.empty)
            .copied()
            .filter(|at| selects(self.all[*at].0, labels))
            .collect();
        chosen.sort_unstable();
        chosen.into_iter().map(|at| &self.all[at].1)
    }
}

fn pairs(labels: &Labels) -> impl Iterator<Item = (&str, &str)> {
    labels.iter().map(|(key, value)| (key.as_str(), value.as_str()))
}

fn selects(selector: &Labels, labels: &Labels) -> bool {
    selector.iter().all(|(key, value)| labels.get(key) == Some(value))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn labels() -> impl Strategy<Value = Labels> {
        proptest::collection::btree_map("[ab]{1,2}", "[xy]?", 0..4)
    }

    proptest! {
        #[test]
        fn the_same_are_found_as_by_asking_each(
            selectors in proptest::collection::vec(labels(), 0..12),
            labels in labels(),
        ) {
            let all = selectors.iter().enumerate().map(|(at, selector)| (selector, at)).collect();
            let found: Vec<usize> = Selectors::new(all).choosing(&labels).copied().collect();
            let asked: Vec<usize> = (0..selectors.len()).filter(|at| selects(&selectors[*at], &labels)).collect();
            prop_assert_eq!(found, asked);
        }
    }
}
