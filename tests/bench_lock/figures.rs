//! Milliseconds, and what stands where in them.

/// Figures of one thing.
#[derive(Debug, Clone, Default)]
pub(crate) struct Figures(Vec<f64>);

impl Figures {
    /// How many there are.
    pub(crate) fn count(&self) -> usize {
        self.0.len()
    }

    /// So many percent of them are not above this one (nearest rank; 50 is the median, 100 the largest). 0 if there are none.
    pub(crate) fn p(&self, percent: usize) -> f64 {
        let rank = (self.0.len() * percent).div_ceil(100).max(1);
        self.0.get(rank - 1).copied().unwrap_or_default()
    }

    /// All that is said of them.
    pub(crate) fn line(&self) -> String {
        format!(
            "p50 {:>6.1}   p95 {:>6.1}   p99 {:>6.1}   max {:>6.1}",
            self.p(50),
            self.p(95),
            self.p(99),
            self.p(100)
        )
    }
}

impl FromIterator<f64> for Figures {
    fn from_iter<T: IntoIterator<Item = f64>>(figures: T) -> Self {
        let mut figures: Vec<_> = figures.into_iter().collect();
        figures.sort_by(f64::total_cmp);
        Self(figures)
    }
}
