//! Grafana's dashboards: their queries with the variables put in, and what is untidy in a file.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use anyhow::{Context as _, Result, bail};
use serde_json::Value;

use super::promql;

/// What panels must name as their data source.
const DATASOURCE: &str = "${datasource}";
/// Of Grafana 12; later ones read it, too.
const SCHEMA_VERSION: u64 = 41;
/// The width of Grafana's grid.
const GRID: u64 = 24;
/// Fields that an export brings and that change with every one.
const EXPORTED: [&str; 5] = ["id", "version", "iteration", "gnetId", "__inputs"];

#[derive(Clone, Debug)]
pub struct Dashboard {
    pub file: String,
    pub json: Value,
}

/// One query of a panel.
#[derive(Clone, Debug)]
pub struct Query {
    /// Panel and query, for a person to find it.
    pub place: String,
    pub expression: String,
    /// The labels that legend or columns show.
    pub shown: BTreeSet<String>,
}

/// Where a variable's choices come from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Choices {
    /// The values of a label of a metric; the regular expression that stands for all of them.
    Label { metric: String, label: String, all: String },
    /// Written down, the default first.
    Listed(Vec<String>),
}

/// # Errors
/// A file cannot be read, or is no JSON.
pub fn load(folder: &Path) -> Result<Vec<Dashboard>> {
    let paths = super::files(folder, "json")?;
    let parsed = paths.iter().map(|path| {
        Ok(Dashboard {
            file: path.file_name().unwrap_or_default().to_string_lossy().into_owned(),
            json: serde_json::from_str(&super::read(path)?).with_context(|| path.display().to_string())?,
        })
    });
    parsed.collect()
}

fn list<'a>(value: &'a Value, pointer: &str) -> &'a [Value] {
    value.pointer(pointer).and_then(Value::as_array).map_or(&[], Vec::as_slice)
}

fn text<'a>(value: &'a Value, pointer: &str) -> &'a str {
    value.pointer(pointer).and_then(Value::as_str).unwrap_or_default()
}

impl Dashboard {
    fn panels(&self) -> impl Iterator<Item = &Value> {
        list(&self.json, "/panels").iter().filter(|panel| panel["type"] != "row")
    }

    #[must_use]
    pub fn queries(&self) -> Vec<Query> {
        let mut queries = Vec::new();
        for panel in self.panels() {
            for target in list(panel, "/targets") {
                let mut shown: BTreeSet<String> = legend_labels(text(target, "/legendFormat")).collect();
                for transformation in list(panel, "/transformations") {
                    let renamed = transformation.pointer("/options/renameByName").and_then(Value::as_object);
                    shown.extend(renamed.into_iter().flatten().map(|(label, _)| label.clone()));
                }
                // The column of the samples, which is no label.
                shown.remove("Value");
                queries.push(Query {
                    place: format!("{}: {} ({})", self.file, text(panel, "/title"), text(target, "/refId")),
                    expression: text(target, "/expr").to_owned(),
                    shown,
                });
            }
        }
        queries
    }

    /// The variables beside the data source.
    ///
    /// # Errors
    /// One of a kind that is not known here.
    pub fn variables(&self) -> Result<BTreeMap<String, Choices>> {
        let mut variables = BTreeMap::new();
        for variable in list(&self.json, "/templating/list") {
            let name = text(variable, "/name");
            let choices = match text(variable, "/type") {
                "datasource" => continue,
                "custom" => Choices::Listed(text(variable, "/query").split(',').map(str::to_owned).collect()),
                "query" => {
                    let query = text(variable, "/query/query");
                    let (metric, label) = query
                        .strip_prefix("label_values(")
                        .and_then(|rest| rest.strip_suffix(')')?.split_once(", "))
                        .with_context(|| format!("{}: variable {name}: {query:?}", self.file))?;
                    Choices::Label {
                        metric: metric.to_owned(),
                        label: label.to_owned(),
                        all: text(variable, "/allValue").to_owned(),
                    }
                }
                kind => bail!("{}: variable {name} is of the unknown type {kind:?}", self.file),
            };
            variables.insert(name.to_owned(), choices);
        }
        Ok(variables)
    }

    /// What is untidy, each with its place.
    #[must_use]
    pub fn faults(&self, metrics: &BTreeSet<String>) -> Vec<String> {
        let mut faults = Vec::new();
        let mut fault = |place: &str, what: &str| faults.push(format!("{}: {place}: {what}", self.file));
        if !text(&self.json, "/uid").starts_with("culvert-") {
            fault("uid", "does not begin with culvert-");
        }
        for field in ["/title", "/description"] {
            if text(&self.json, field).is_empty() {
                fault(field, "is missing");
            }
        }
        if self.json["schemaVersion"] != SCHEMA_VERSION {
            fault("schemaVersion", &format!("is not {SCHEMA_VERSION}"));
        }
        for field in EXPORTED.iter().filter(|field| self.json.get(field).is_some()) {
            fault(field, "changes with every export: remove it");
        }
        if has_null(&self.json) {
            fault("the file", "has a null, which says nothing: remove it");
        }
        let ids: Vec<u64> = list(&self.json, "/panels")
            .iter()
            .filter_map(|panel| panel["id"].as_u64())
            .collect();
        if !ids.iter().copied().eq(1..=list(&self.json, "/panels").len() as u64) {
            fault("panels", &format!("their ids are not 1, 2, 3 …: {ids:?}"));
        }
        let mut taken = BTreeSet::new();
        for panel in list(&self.json, "/panels") {
            for what in panel_faults(panel, &mut taken) {
                fault(text(panel, "/title"), &what);
            }
        }
        let used: BTreeSet<String> = self
            .queries()
            .iter()
            .flat_map(|query| variables_of(&query.expression))
            .collect();
        let used: BTreeSet<&str> = used
            .iter()
            .map(String::as_str)
            .filter(|name| !name.starts_with("__"))
            .collect();
        match self.variables() {
            Err(error) => fault("templating", &error.to_string()),
            Ok(declared) => {
                let declared: BTreeSet<&str> = declared.keys().map(String::as_str).collect();
                if declared != used {
                    fault("templating", &format!("declared are {declared:?}, used {used:?}"));
                }
            }
        }
        for query in self.queries() {
            for selector in promql::selectors(&query.expression) {
                if !metrics.contains(&selector.metric) {
                    faults.push(format!("{}: docs/METRICS.md has no {}", query.place, selector.metric));
                }
            }
        }
        faults
    }
}

fn panel_faults(panel: &Value, taken: &mut BTreeSet<(u64, u64)>) -> Vec<String> {
    let mut faults = Vec::new();
    let mut need = |holds: bool, what: &str| {
        if !holds {
            faults.push(what.to_owned());
        }
    };
    let [x, y, w, h] = ["x", "y", "w", "h"].map(|side| panel["gridPos"][side].as_u64().unwrap_or(GRID));
    need(x + w <= GRID, "lies beside the grid");
    let cells: Vec<(u64, u64)> = (x..x + w).flat_map(|x| (y..y + h).map(move |y| (x, y))).collect();
    need(cells.iter().all(|cell| taken.insert(*cell)), "lies over another panel");
    need(!text(panel, "/title").is_empty(), "has no title");
    if panel["type"] == "row" {
        return faults;
    }
    need(!text(panel, "/description").is_empty(), "has no description");
    need(!text(panel, "/fieldConfig/defaults/unit").is_empty(), "has no unit");
    need(
        text(panel, "/datasource/uid") == DATASOURCE,
        "does not take its data source from the variable",
    );
    let ids: BTreeSet<&str> = list(panel, "/targets").iter().map(|target| text(target, "/refId")).collect();
    need(
        !ids.is_empty() && ids.len() == list(panel, "/targets").len(),
        "has no queries, or two of one refId",
    );
    faults
}

fn has_null(value: &Value) -> bool {
    match value {
        Value::Null => true,
        Value::Array(items) => items.iter().any(has_null),
        Value::Object(fields) => fields.values().any(has_null),
        _ => false,
    }
}

/// What stands in double braces.
fn legend_labels(legend: &str) -> impl Iterator<Item = String> {
    let labels = legend.split("{{").skip(1).filter_map(|rest| rest.split("}}").next());
    labels.map(|label| label.trim().to_owned())
}

fn is_variable(c: char) -> bool {
    c.is_ascii_alphanumeric() || c == '_'
}

/// Names behind a dollar.
#[must_use]
pub fn variables_of(expression: &str) -> BTreeSet<String> {
    let names = expression.split('$').skip(1);
    names
        .map(|rest| rest.chars().take_while(|c| is_variable(*c)).collect())
        .collect()
}

/// The expression with its variables' values.
///
/// # Errors
/// A variable has no value.
pub fn substitute(expression: &str, values: &BTreeMap<String, String>) -> Result<String> {
    let mut parts = expression.split('$');
    let mut whole = parts.next().unwrap_or_default().to_owned();
    for part in parts {
        let end = part.find(|c| !is_variable(c)).unwrap_or(part.len());
        let (name, rest) = part.split_at(end);
        let value = values
            .get(name)
            .with_context(|| format!("no value of ${name} in {expression}"))?;
        whole.push_str(value);
        whole.push_str(rest);
    }
    Ok(whole)
}
