//! Which of several endpoints a connection goes to. Pure: what can be chosen and a random number in, a choice out.

mod affinity;

pub use affinity::{Affinities, AffinityKey};

/// Takes one out of `candidates`, each as likely as its weight among all. A weight of 0 is never chosen.
///
/// `random` is any number; its remainder decides, whose bias is below 2⁻³² for sums that fit 32 bits.
pub fn take<T>(candidates: &mut Vec<T>, weight: impl Fn(&T) -> u32, random: u64) -> Option<T> {
    let sum: u64 = candidates.iter().map(|candidate| u64::from(weight(candidate))).sum();
    let mut left = random.checked_rem(sum)?;
    let chosen = candidates.iter().position(|candidate| {
        let weight = u64::from(weight(candidate));
        let hit = left < weight;
        left = left.saturating_sub(weight);
        hit
    })?;
    Some(candidates.swap_remove(chosen))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// How often each is chosen over every remainder.
    fn counts(weights: &[u32]) -> Vec<u32> {
        let mut counts = vec![0; weights.len()];
        for random in 0..weights.iter().map(|weight| u64::from(*weight)).sum() {
            let mut candidates: Vec<usize> = (0..weights.len()).collect();
            let chosen = take(&mut candidates, |candidate| weights[*candidate], random).expect("some weight");
            assert!(!candidates.contains(&chosen) && candidates.len() + 1 == weights.len());
            counts[chosen] += 1;
        }
        counts
    }

    #[test]
    fn each_is_chosen_as_its_weight_says() {
        for weights in [&[1][..], &[1, 1, 1], &[3, 0, 1], &[0, 0, 7], &[5, 2, 1]] {
            assert_eq!(counts(weights), weights);
        }
    }

    #[test]
    fn nothing_is_chosen_from_nothing() {
        assert_eq!(take(&mut Vec::<u8>::new(), |_| 1, 7), None);
        assert_eq!(take(&mut vec![1, 2], |_| 0, 7), None);
        assert_eq!(take(&mut vec![1], |_| u32::MAX, u64::MAX), Some(1));
    }
}
