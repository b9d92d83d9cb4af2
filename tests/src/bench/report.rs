use std::collections::BTreeMap;
use std::io::Write as _;

use anyhow::Result;
use serde_json::json;

use super::System;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    Table,
    /// One object a line.
    Json,
}

/// What was measured, in the order of its first measurement.
#[derive(Debug, Default)]
pub struct Results {
    order: Vec<(&'static str, &'static str)>,
    values: BTreeMap<(&'static str, System), Vec<f64>>,
}

struct Summary {
    median: f64,
    min: f64,
    max: f64,
    n: usize,
}

/// What was measured of one system alone.
#[derive(Debug)]
pub struct Samples {
    system: &'static str,
    measures: Vec<(String, &'static str, Vec<f64>)>,
}

impl Samples {
    pub fn new(system: &'static str) -> Self {
        Self {
            system,
            measures: Vec::new(),
        }
    }

    pub fn add(&mut self, measure: &str, unit: &'static str, value: f64) {
        match self.measures.iter_mut().find(|(name, _, _)| name == measure) {
            Some((_, _, values)) => values.push(value),
            None => self.measures.push((measure.to_owned(), unit, vec![value])),
        }
    }

    pub fn print(&self, format: Format, what: &str) -> Result<()> {
        let mut out = std::io::stdout().lock();
        if format == Format::Table {
            writeln!(
                out,
                "\n{what}\n\n{:<26}{:<12}{:>12}{:>26}{:>6}",
                "measure", "unit", "median", "[least–most]", "n"
            )?;
        }
        for (measure, unit, values) in &self.measures {
            let Some(summary) = Summary::of(values) else { continue };
            match format {
                Format::Json => writeln!(out, "{}", summary.json(measure, self.system, unit))?,
                Format::Table => {
                    let range = format!("[{:.3}–{:.3}]", summary.min, summary.max);
                    writeln!(
                        out,
                        "{measure:<26}{unit:<12}{:>12.3}{range:>26}{:>6}",
                        summary.median, summary.n
                    )?;
                }
            }
        }
        Ok(())
    }
}

impl Summary {
    fn of(values: &[f64]) -> Option<Self> {
        let mut values = values.to_vec();
        values.sort_by(f64::total_cmp);
        Some(Self {
            median: median(&values)?,
            min: *values.first()?,
            max: *values.last()?,
            n: values.len(),
        })
    }

    fn json(&self, measure: &str, system: &str, unit: &str) -> serde_json::Value {
        let Self { median, min, max, n } = self;
        json!({"measure": measure, "system": system, "unit": unit, "median": median, "min": min, "max": max, "n": n})
    }
}

impl Results {
    pub fn add(&mut self, measure: &'static str, unit: &'static str, system: System, value: f64) {
        if !self.order.contains(&(measure, unit)) {
            self.order.push((measure, unit));
        }
        self.values.entry((measure, system)).or_default().push(value);
    }

    fn summary(&self, measure: &'static str, system: System) -> Option<Summary> {
        Summary::of(self.values.get(&(measure, system))?)
    }

    pub fn print(&self, format: Format) -> Result<()> {
        let mut out = std::io::stdout().lock();
        if format == Format::Table {
            writeln!(
                out,
                "\nmedians [least–most]; × is the ratio to direct; *_cpu of a bulk measure counts the agents, all others everyone\n"
            )?;
            write!(out, "{:<20}{:<14}", "measure", "unit")?;
            for system in System::ALL {
                write!(out, "{:>34}", system.as_str())?;
            }
            writeln!(out)?;
        }
        for &(measure, unit) in &self.order {
            let direct = self.summary(measure, System::Direct).map(|summary| summary.median);
            let mut line = format!("{measure:<20}{unit:<14}");
            for system in System::ALL {
                let summary = self.summary(measure, system);
                match (&summary, format) {
                    (Some(summary), Format::Json) => writeln!(out, "{}", summary.json(measure, system.as_str(), unit))?,
                    (Some(summary), Format::Table) => line.push_str(&format!("{:>34}", cell(summary, system, direct))),
                    (None, _) => line.push_str(&format!("{:>34}", "–")),
                }
            }
            if format == Format::Table {
                writeln!(out, "{line}")?;
            }
        }
        Ok(())
    }
}

fn cell(summary: &Summary, system: System, direct: Option<f64>) -> String {
    let ratio = match direct {
        Some(direct) if system != System::Direct && direct > 0.0 => format!(" ×{:.2}", summary.median / direct),
        _ => String::new(),
    };
    format!("{:.2} [{:.2}–{:.2}]{ratio}", summary.median, summary.min, summary.max)
}

/// Of sorted values.
fn median(values: &[f64]) -> Option<f64> {
    let (low, high) = (values.get(values.len().checked_sub(1)? / 2)?, values.get(values.len() / 2)?);
    Some((low + high) / 2.0)
}

pub fn progress(step: &str) {
    let _ = writeln!(std::io::stderr(), "{step}");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn medians() {
        assert_eq!(median(&[]), None);
        assert_eq!(median(&[1.0]), Some(1.0));
        assert_eq!(median(&[1.0, 3.0]), Some(2.0));
        assert_eq!(median(&[1.0, 2.0, 9.0]), Some(2.0));
    }
}
