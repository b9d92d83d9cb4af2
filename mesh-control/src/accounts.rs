//! Service accounts that were deleted. Pods may name an account that has no manifest, as on bare machines; one that had a manifest and
//! has none any longer is *revoked*: its certificates are dropped, and its connections cut. Pure; kept in the state directory, or in the
//! cluster, so that a restart of the control plane pardons nobody.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};

use crate::limits::{MAX_CERTIFICATE_LIFETIME, MAX_OBJECTS, MAX_REVOKED};
use crate::objects::{Kind, Object, World};

/// Namespace and name.
pub type Account = (String, String);

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Accounts {
    /// With a manifest now.
    known: BTreeSet<Account>,
    /// Unix seconds of the deletion.
    revoked: BTreeMap<Account, u64>,
}

/// As it is kept. Another version reads it as well: fields are only added, each with a meaning for where it is missing.
#[derive(Serialize, Deserialize)]
struct Kept {
    known: BTreeSet<Account>,
    revoked: Vec<(Account, u64)>,
}

impl Accounts {
    /// # Errors
    /// It is none that this program wrote.
    pub fn from_json(bytes: &[u8]) -> Result<Self, serde_json::Error> {
        let kept: Kept = serde_json::from_slice(bytes)?;
        Ok(Self {
            known: kept.known,
            revoked: kept.revoked.into_iter().collect(),
        })
    }

    /// # Errors
    /// None that can happen to names and numbers.
    pub fn to_json(&self) -> Result<Vec<u8>, serde_json::Error> {
        serde_json::to_vec(&Kept {
            known: self.known.clone(),
            revoked: self
                .revoked
                .iter()
                .map(|(account, since)| (account.clone(), *since))
                .collect(),
        })
    }

    /// Takes those that Pods name and that are not there for deleted ones: the API server lets no Pod be made whose account is missing. To
    /// be asked of a world that the accounts were read into after the Pods. It says after a restart what else only a file would.
    pub fn presume_deleted(&mut self, world: &World, now: u64) {
        if self.is_cut() {
            return;
        }
        for (id, object) in world {
            if let Object::Pod(pod) = object.as_ref()
                && !pod.finished
            {
                let account = (id.namespace.clone(), pod.service_account.clone());
                if !self.known.contains(&account) {
                    tracing::warn!(
                        namespace = account.0,
                        name = account.1,
                        "service account deleted, while Pods have it"
                    );
                    self.revoked.entry(account).or_insert(now);
                }
            }
        }
    }

    /// What is to be kept where several write it, of `kept` by others and of these: who is there is not deleted.
    #[must_use]
    pub fn to_share(&self, kept: &Self, now: u64) -> Self {
        let holds = |since: u64| now.saturating_sub(since) <= MAX_CERTIFICATE_LIFETIME.as_secs();
        let of_others = kept
            .revoked
            .iter()
            .filter(|(account, since)| !self.known.contains(*account) && holds(**since));
        let mut revoked: BTreeMap<Account, u64> = of_others.map(|(account, since)| (account.clone(), *since)).collect();
        for (account, since) in &self.revoked {
            if revoked.len() < MAX_REVOKED {
                revoked.entry(account.clone()).or_insert(*since);
            }
        }
        Self {
            known: BTreeSet::new(),
            revoked,
        }
    }

    /// Whether accounts may be missing for want of room.
    fn is_cut(&self) -> bool {
        self.known.len() >= MAX_OBJECTS
    }

    /// Takes over what has a manifest now. An account is forgotten when no Pod names it and none of its certificates can hold any
    /// longer; beyond [`MAX_REVOKED`], the oldest without Pods go first.
    pub fn follow(&mut self, world: &World, now: u64) {
        let of_kind = |kind: Kind| world.iter().filter(move |(id, _)| id.kind == kind);
        let present: BTreeSet<Account> = of_kind(Kind::ServiceAccount)
            .map(|(id, _)| (id.namespace.clone(), id.name.clone()))
            .collect();
        if present.len() >= MAX_OBJECTS {
            tracing::error!("{MAX_OBJECTS} service accounts or more: some are left out, so none is taken for deleted");
            self.known = present;
            return;
        }
        // What was left out before is not known to have been there.
        let was_cut = self.is_cut();
        for gone in self.known.difference(&present).filter(|_| !was_cut) {
            tracing::warn!(
                namespace = gone.0,
                name = gone.1,
                "service account deleted: its certificates and connections end"
            );
            self.revoked.insert(gone.clone(), now);
        }
        for account in &present {
            if self.revoked.remove(account).is_some() {
                tracing::info!(namespace = account.0, name = account.1, "service account is back");
            }
        }
        self.known = present;
        let named: BTreeSet<(&str, &str)> = of_kind(Kind::Pod)
            .filter_map(|(id, object)| match object.as_ref() {
                Object::Pod(pod) => Some((id.namespace.as_str(), pod.service_account.as_str())),
                _ => None,
            })
            .collect();
        let is_named = |account: &Account| named.contains(&(account.0.as_str(), account.1.as_str()));
        self.revoked
            .retain(|account, since| is_named(account) || now.saturating_sub(*since) <= MAX_CERTIFICATE_LIFETIME.as_secs());
        let beyond = self.revoked.len().saturating_sub(MAX_REVOKED);
        if beyond > 0 {
            let mut oldest: Vec<(bool, u64, Account)> = self
                .revoked
                .iter()
                .map(|(account, since)| (is_named(account), *since, account.clone()))
                .collect();
            oldest.sort();
            tracing::error!(
                forgotten = beyond,
                "more than {MAX_REVOKED} deleted service accounts: the oldest are forgotten"
            );
            for (_, _, account) in oldest.into_iter().take(beyond) {
                self.revoked.remove(&account);
            }
        }
    }

    #[must_use]
    pub fn revoked(&self) -> impl ExactSizeIterator<Item = &Account> {
        self.revoked.keys()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::objects::ObjectId;
    use crate::registry::{Registry, Scan};

    const DAYS_90: u64 = 90 * 24 * 3600;

    fn account(name: &str) -> String {
        format!("apiVersion: v1\nkind: ServiceAccount\nmetadata: {{name: {name}, namespace: shop}}\n---\n")
    }

    fn pod(account: &str) -> String {
        format!(
            "apiVersion: v1\nkind: Pod\nmetadata: {{name: of-{account}, namespace: shop}}\nspec: {{serviceAccountName: {account}}}\n---\n"
        )
    }

    fn world(text: &str) -> Arc<World> {
        let mut registry = Registry::default();
        registry.apply(&Scan::from([("mesh.yaml".to_owned(), Ok(Arc::from(text)))]));
        assert!(registry.rejections().is_empty(), "{:?}", registry.rejections());
        registry.world()
    }

    fn revoked(accounts: &Accounts) -> Vec<&str> {
        accounts.revoked().map(|(_, name)| name.as_str()).collect()
    }

    #[test]
    fn where_accounts_are_left_out_none_is_taken_for_deleted() {
        let id = |kind, name: String| ObjectId {
            kind,
            namespace: "shop".to_owned(),
            name,
        };
        let pod = Object::Pod(Box::new(crate::objects::Pod {
            service_account: "web".to_owned(),
            ..crate::objects::Pod::default()
        }));
        // One tenant makes so many that others find no room.
        let mut full: World = (0..MAX_OBJECTS)
            .map(|n| (id(Kind::ServiceAccount, format!("a{n}")), Arc::new(Object::ServiceAccount)))
            .collect();
        full.insert(id(Kind::Pod, "of-web".to_owned()), Arc::new(pod));
        let mut accounts = Accounts::default();
        accounts.follow(&full, 1);
        accounts.presume_deleted(&full, 1);
        assert!(revoked(&accounts).is_empty(), "after a start");
        let mut accounts = Accounts::default();
        accounts.follow(&world(&account("web")), 1);
        accounts.follow(&full, 2);
        assert!(revoked(&accounts).is_empty(), "after a list");
        // Once there is room again, deletions count again.
        accounts.follow(&world(&account("web")), 3);
        assert!(revoked(&accounts).is_empty());
        accounts.follow(&world(&self::pod("web")), 4);
        assert_eq!(revoked(&accounts), ["web"]);
    }

    #[test]
    fn only_what_was_there_can_be_deleted_and_it_can_come_back() {
        let mut accounts = Accounts::default();
        accounts.follow(&world(&(pod("never-there") + &account("web"))), 1);
        assert!(revoked(&accounts).is_empty());
        accounts.follow(&world(&(pod("never-there") + &pod("web"))), 2);
        assert_eq!(revoked(&accounts), ["web"]);
        // Kept over a restart.
        let mut accounts = Accounts::from_json(&accounts.to_json().expect("JSON")).expect("the same");
        accounts.follow(&world(&pod("web")), 3);
        assert_eq!(revoked(&accounts), ["web"]);
        // Deleted while nobody looked.
        accounts.follow(&world(&(account("web") + &account("other"))), 4);
        assert!(revoked(&accounts).is_empty());
        let mut accounts = Accounts::from_json(&accounts.to_json().expect("JSON")).expect("the same");
        accounts.follow(&world(&account("web")), 5);
        assert_eq!(revoked(&accounts), ["other"]);
    }

    #[test]
    fn an_account_is_forgotten_when_neither_pods_nor_certificates_are_left() {
        let mut accounts = Accounts::default();
        accounts.follow(&world(&(account("web") + &account("idle"))), 0);
        accounts.follow(&world(&pod("web")), 10);
        accounts.follow(&world(&pod("web")), 10 + DAYS_90);
        assert_eq!(revoked(&accounts), ["idle", "web"]);
        accounts.follow(&world(&pod("web")), 11 + DAYS_90);
        assert_eq!(revoked(&accounts), ["web"], "a Pod still names it");
        accounts.follow(&world(&pod("other")), 12 + DAYS_90);
        assert!(revoked(&accounts).is_empty());
    }

    #[test]
    fn there_are_only_so_many() {
        let mut accounts = Accounts::default();
        let manifests: String = (0..MAX_REVOKED / 2).map(|n| account(&format!("a{n}"))).collect();
        let more: String = (0..=MAX_REVOKED / 2).map(|n| account(&format!("b{n}"))).collect();
        for (now, text) in [(1, &manifests), (2, &more)] {
            let world: World = text
                .split("---\n")
                .filter(|text| !text.is_empty())
                .flat_map(|text| (*world(text)).clone())
                .collect();
            accounts.follow(&world, now);
        }
        accounts.follow(&world(&pod("a0")), 3);
        assert_eq!(accounts.revoked().len(), MAX_REVOKED);
        assert!(accounts.revoked().any(|(_, name)| name == "a0"), "a Pod names it");
        assert!(!accounts.revoked().any(|(_, name)| name == "a1"), "the oldest of the others");
    }

    #[test]
    fn what_is_kept_and_damaged_is_an_error() {
        for damaged in ["", "{}", "[]", r#"{"known":[]}"#, r#"{"known":[],"revoked":1}"#] {
            assert!(Accounts::from_json(damaged.as_bytes()).is_err(), "{damaged}");
        }
        let of_a_later_version = r#"{"known":[],"revoked":[],"more":1}"#;
        assert_eq!(
            Accounts::from_json(of_a_later_version.as_bytes()).unwrap(),
            Accounts::default()
        );
    }
}
