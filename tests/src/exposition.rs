//! The Prometheus text format, read strictly: what a scraper might forgive is an error here.

use std::collections::{BTreeMap, BTreeSet};

#[derive(Clone, Debug, Default, PartialEq)]
pub struct Family {
    pub kind: String,
    pub samples: Vec<Sample>,
}

#[derive(Clone, Debug, PartialEq)]
pub struct Sample {
    /// A histogram's samples have names of their own.
    pub name: String,
    pub labels: BTreeMap<String, String>,
    pub value: f64,
}

/// Families by name.
///
/// # Errors
/// The first line that breaks the format, or says something twice.
pub fn parse(page: &str) -> Result<BTreeMap<String, Family>, String> {
    if !page.is_empty() && !page.ends_with('\n') {
        return Err("the last line does not end".to_owned());
    }
    let mut families: BTreeMap<String, Family> = BTreeMap::new();
    let mut helped = BTreeSet::new();
    let mut series = BTreeSet::new();
    let mut current = String::new();
    for line in page.split_terminator('\n') {
        let fault = |what: &str| format!("{what}: {line:?}");
        if let Some(help) = line.strip_prefix("# HELP ") {
            let (name, text) = help.split_once(' ').ok_or_else(|| fault("a help without its text"))?;
            if !is_name(name) || text.is_empty() || !helped.insert(name.to_owned()) {
                return Err(fault("a bad name, an empty help, or a second one"));
            }
        } else if let Some(kind) = line.strip_prefix("# TYPE ") {
            let (name, kind) = kind.split_once(' ').ok_or_else(|| fault("a type without its kind"))?;
            if !["counter", "gauge", "histogram"].contains(&kind) || !is_name(name) {
                return Err(fault("a kind or name that does not exist"));
            }
            let family = Family {
                kind: kind.to_owned(),
                samples: Vec::new(),
            };
            if families.insert(name.to_owned(), family).is_some() {
                return Err(fault("a second family of that name"));
            }
            name.clone_into(&mut current);
        } else {
            let sample = sample(line).ok_or_else(|| fault("not a sample"))?;
            let family = families.get_mut(&current).ok_or_else(|| fault("a sample of no family"))?;
            if !belongs(&sample.name, &current, &family.kind) {
                return Err(fault("a sample of another family"));
            }
            if !series.insert((sample.name.clone(), sample.labels.clone())) {
                return Err(fault("a series twice"));
            }
            family.samples.push(sample);
        }
    }
    Ok(families)
}

fn belongs(sample: &str, family: &str, kind: &str) -> bool {
    match sample.strip_prefix(family) {
        Some("") => kind != "histogram",
        Some("_bucket" | "_sum" | "_count") => kind == "histogram",
        _ => false,
    }
}

fn is_name(name: &str) -> bool {
    let ends = |c: char| c.is_ascii_alphabetic() || c == '_';
    name.starts_with(ends) && name.chars().all(|c| ends(c) || c.is_ascii_digit())
}

fn sample(line: &str) -> Option<Sample> {
    let end = line.find(['{', ' '])?;
    let (name, rest) = line.split_at(end);
    let (labels, rest) = match rest.strip_prefix('{') {
        Some(rest) => labels(rest)?,
        None => (BTreeMap::new(), rest),
    };
    let number = rest.strip_prefix(' ')?;
    let plain = number.chars().all(|c| c.is_ascii_digit() || "+-.eE".contains(c));
    (is_name(name) && (plain || ["+Inf", "-Inf", "NaN"].contains(&number))).then_some(())?;
    Some(Sample {
        name: name.to_owned(),
        labels,
        value: number.parse().ok()?,
    })
}

/// The labels after the opening brace, and what follows the closing one.
fn labels(mut rest: &str) -> Option<(BTreeMap<String, String>, &str)> {
    let mut labels = BTreeMap::new();
    loop {
        if let Some(rest) = rest.strip_prefix('}') {
            return Some((labels, rest));
        }
        if !labels.is_empty() {
            rest = rest.strip_prefix(',')?;
        }
        let (name, quoted) = rest.split_once("=\"")?;
        let (value, after) = unquote(quoted)?;
        let is_new = labels.insert(name.to_owned(), value).is_none();
        (is_name(name) && is_new).then_some(())?;
        rest = after;
    }
}

fn unquote(quoted: &str) -> Option<(String, &str)> {
    let mut value = String::new();
    let mut characters = quoted.char_indices();
    loop {
        match characters.next()? {
            (at, '"') => return Some((value, quoted.get(at + 1..)?)),
            (_, '\\') => value.push(match characters.next()?.1 {
                'n' => '\n',
                character @ ('\\' | '"') => character,
                _ => return None,
            }),
            // Everything else may stand as it is, carriage returns included: lines end in '\n', and only there.
            (_, '\n') => return None,
            (_, character) => value.push(character),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_is_read_with_its_escapes() {
        let page = "# HELP a b\n# TYPE a counter\na{x=\"q\\\"b\\\\n\\n\",y=\"ü}\"} 3\na 4\n\
                    # HELP h b\n# TYPE h histogram\nh_bucket{le=\"+Inf\"} 1\nh_sum 0.5\nh_count 1\n";
        let families = parse(page).unwrap();
        assert_eq!(families["a"].samples[0].labels["x"], "q\"b\\n\n");
        assert_eq!(families["a"].samples[0].labels["y"], "ü}");
        assert_eq!(families["h"].samples.len(), 3);
    }

    #[test]
    fn what_breaks_the_format_is_refused() {
        for broken in [
            "a 1\n",
            "# TYPE a counter\na 1",
            "# TYPE a counter\na 1\na 2\n",
            "# TYPE a counter\na{x=\"1\"y=\"2\"} 1\n",
            "# TYPE a counter\na{x=\"1\",x=\"2\"} 1\n",
            "# TYPE a counter\na{x=\"\\t\"} 1\n",
            "# TYPE a counter\na{x=\"1\n\"} 1\n",
            "# TYPE a counter\na{x=\"\"\"} 1\n",
            "# TYPE a counter\nb 1\n",
            "# TYPE a counter\na one\n",
            "# TYPE a counter\na 1\n# TYPE a counter\n",
            "# TYPE a whatever\n",
        ] {
            assert!(parse(broken).is_err(), "{broken:?}");
        }
    }
}
