//! The root of trust in its Secret.

use anyhow::{Context as _, Result, ensure};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use mesh_control::kubernetes::root_secret::RootSecret;
use mesh_control::limits::Bounds;
use mesh_control::roots::Step;
use mesh_tests::kube::client;
use mesh_tests::poll::{self, SOON};
use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair, KeyUsagePurpose};
use time::OffsetDateTime;

use crate::{Bench, Control, NAMESPACE, taken};

const REPLICAS: usize = 8;

impl Bench {
    fn secret(&self) -> Result<RootSecret> {
        let client = self.runtime.block_on(client(&self.kubeconfig))?;
        Ok(RootSecret::new(client, NAMESPACE, "cluster.local"))
    }

    fn delete_secret(&self) -> Result<()> {
        let delete = ["-n", NAMESPACE, "delete", "secret", "culvert-root", "--ignore-not-found"];
        self.server.kubectl().run(&delete).map(drop)
    }

    /// One key of the Secret, as an operator may write it.
    fn put(&self, key: &str, text: &str) -> Result<()> {
        let patch = serde_json::json!({"data": {key: STANDARD.encode(text)}}).to_string();
        let patch = [
            "-n",
            NAMESPACE,
            "patch",
            "secret",
            "culvert-root",
            "--type=merge",
            "-p",
            &patch,
        ];
        self.server.kubectl().run(&patch).map(drop)
    }

    fn key(&self, key: &str) -> Result<String> {
        let secret = self.server.kubectl().get(&["-n", NAMESPACE, "secret", "culvert-root"])?;
        let value = secret["data"][key].as_str().with_context(|| format!("no key {key}"))?;
        Ok(String::from_utf8(STANDARD.decode(value)?)?)
    }

    fn rotate(&self, step: Step) -> Result<String> {
        let secret = self.secret()?;
        Ok(self.runtime.block_on(secret.rotate(step, OffsetDateTime::now_utc()))?)
    }
}

impl Control {
    fn trusts(&self, bench: &Bench, roots: usize) -> Result<()> {
        poll::until_true(&format!("{roots} roots are trusted and published"), SOON, || {
            let trusted = self.running().control.trust_bundle();
            Ok(trusted.len() == roots && bench.certificates_published()? == roots && bench.published()? == trusted.concat())
        })?;
        // The kubelet brings it to the agents.
        Ok(std::fs::write(self.roots_file(), bench.published()?)?)
    }
}

pub fn race(bench: &mut Bench) -> Result<()> {
    bench.delete_secret()?;
    let replicas: Vec<RootSecret> = (0..REPLICAS).map(|_| bench.secret()).collect::<Result<_>>()?;
    let opened = bench.runtime.block_on(async {
        let mut tasks = tokio::task::JoinSet::new();
        for replica in replicas {
            tasks.spawn(async move { replica.open(OffsetDateTime::now_utc()).await });
        }
        tasks.join_all().await
    });
    let mut roots = Vec::new();
    for opened in opened {
        roots.push(opened?.authority.root_sha256());
    }
    roots.dedup();
    ensure!(roots.len() == 1, "{REPLICAS} replicas have {} roots", roots.len());
    Ok(())
}

/// Under a control plane that runs, each step; what relied on the former root does not break before it is retired.
pub fn rotation(bench: &mut Bench) -> Result<()> {
    bench.delete_secret()?;
    let control = bench.control(Bounds::default())?;
    bench.pod("rotation", "mesh-agent", Some("node-a"))?;
    let token = bench.server.token(NAMESPACE, "mesh-agent", "culvert", Some("rotation"))?;
    let first = taken("before", control.try_with(&token)?)?;
    ensure!(bench.rotate(Step::Activate).is_err() && bench.certificates_published()? == 1);

    bench.rotate(Step::Prepare)?;
    control.trusts(bench, 2)?;
    let same = taken("prepared", control.try_with(&token)?)?;
    ensure!(
        signer(&same)? == signer(&first)?,
        "the next root signs before every agent trusts it"
    );

    bench.rotate(Step::Activate)?;
    poll::until_true("the next root signs", SOON, || {
        let pair = taken("activated", control.try_with(&token)?)?;
        Ok(signer(&pair)? != signer(&first)? && pair.roots.len() == 2)
    })?;
    control.trusts(bench, 2)?;
    // A replica that starts now goes on with the same.
    let other = bench.control(Bounds::default())?;
    ensure!(other.running().control.trust_bundle() == control.running().control.trust_bundle());
    drop(other);

    bench.rotate(Step::Retire)?;
    control.trusts(bench, 1)?;
    let last = taken("retired", control.try_with(&token)?)?;
    ensure!(last.roots.len() == 1 && signer(&last)? != signer(&first)?);
    Ok(())
}

/// Whose certificate follows, or signs, a pair's own: the issuer's key identifier.
fn signer(pair: &mesh_agent::identity::store::CertifiedKeyPair) -> Result<Vec<u8>> {
    let leaf = pair.chain.first().context("a certificate")?;
    let (_, leaf) = x509_parser::parse_x509_certificate(leaf)?;
    let issuer = leaf
        .extensions()
        .iter()
        .find_map(|extension| match extension.parsed_extension() {
            x509_parser::extensions::ParsedExtension::AuthorityKeyIdentifier(issuer) => issuer.key_identifier.as_ref(),
            _ => None,
        });
    Ok(issuer.context("its issuer's key")?.0.to_vec())
}

pub fn broken(bench: &mut Bench) -> Result<()> {
    bench.delete_secret()?;
    let control = bench.control(Bounds::default())?;
    bench.pod("broken", "mesh-agent", Some("node-a"))?;
    let token = bench.server.token(NAMESPACE, "mesh-agent", "culvert", Some("broken"))?;
    let good = bench.key("tls.crt")?;
    let trusted = control.running().control.trust_bundle();
    let failed = || control.metrics.roots_failed.get();
    let mut before = failed();
    for breakage in ["", "no certificate"] {
        bench.put("tls.crt", breakage)?;
        poll::until_true("the breakage is noticed", SOON, || Ok(failed() > before))?;
        before = failed();
        ensure!(
            control.running().control.trust_bundle() == trusted,
            "the last good root was dropped"
        );
        taken("under a broken Secret", control.try_with(&token)?)?;
        // Whoever starts now says what to mend.
        let error = bench
            .control(Bounds::default())
            .err()
            .context("started with a broken Secret")?
            .to_string();
        ensure!(
            error.contains("Secret culvert-system/culvert-root") && error.contains("tls.crt"),
            "{error}"
        );
    }
    bench.delete_secret()?;
    poll::until_true("its absence is noticed", SOON, || Ok(failed() > before))?;
    taken("without a Secret", control.try_with(&token)?)?;
    ensure!(bench.key("tls.crt").is_err(), "a running control plane made another root");
    drop(control);
    // Mended: the old certificate and key cannot be put back here, for the key went with the Secret; a new mesh begins.
    let control = bench.control(Bounds::default())?;
    ensure!(bench.key("tls.crt")? != good);
    taken("of the new root", control.try_with(&token)?).map(drop)
}

/// As cert-manager leaves it: an RSA or EC key, an intermediate, the issuer's root beside it.
pub fn intermediate(bench: &mut Bench) -> Result<()> {
    let root_key = KeyPair::generate()?;
    let root = authority("the organization's root", BasicConstraints::Unconstrained);
    let root_pem = root.self_signed(&root_key)?.pem();
    let issuer = Issuer::new(root, root_key);
    let key = KeyPair::generate()?;
    let signed = authority("the mesh", BasicConstraints::Constrained(0)).signed_by(&key, &issuer)?;
    bench.delete_secret()?;
    let data = |text: &str| STANDARD.encode(text);
    let secret = serde_json::json!({
        "apiVersion": "v1", "kind": "Secret", "type": "kubernetes.io/tls",
        "metadata": {
            "name": "culvert-root", "namespace": NAMESPACE,
            "annotations": {"cert-manager.io/certificate-name": "culvert-root"},
        },
        "data": {"tls.crt": data(&signed.pem()), "tls.key": data(&key.serialize_pem()), "ca.crt": data(&root_pem)},
    });
    bench.server.kubectl().apply(&secret.to_string())?;
    let control = bench.control(Bounds::default())?;
    ensure!(bench.certificates_published()? == 1);
    bench.pod("intermediate", "mesh-agent", Some("node-a"))?;
    let token = bench.server.token(NAMESPACE, "mesh-agent", "culvert", Some("intermediate"))?;
    let pair = taken("under an intermediate", control.try_with(&token)?)?;
    ensure!(
        pair.chain.len() == 2 && pair.roots.len() == 1,
        "the intermediate is not sent along"
    );

    // It is renewed: other key, same root.
    let key = KeyPair::generate()?;
    let renewed = authority("the mesh", BasicConstraints::Constrained(0)).signed_by(&key, &issuer)?;
    let patch = serde_json::json!({"data": {"tls.crt": data(&renewed.pem()), "tls.key": data(&key.serialize_pem())}}).to_string();
    let patch = [
        "-n",
        NAMESPACE,
        "patch",
        "secret",
        "culvert-root",
        "--type=merge",
        "-p",
        &patch,
    ];
    bench.server.kubectl().run(&patch)?;
    poll::until_true("the renewed intermediate signs", SOON, || {
        let renewed = taken("after the renewal", control.try_with(&token)?)?;
        Ok(renewed.chain[1] != pair.chain[1])
    })?;
    let error = bench
        .rotate(Step::Prepare)
        .err()
        .context("cert-manager's Secret was changed")?
        .to_string();
    ensure!(
        error.contains("cert-manager") && error.contains("trusted-roots.pem"),
        "{error}"
    );
    drop(control);
    bench.delete_secret()
}

fn authority(name: &str, depth: BasicConstraints) -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name.push(DnType::CommonName, name);
    params.is_ca = IsCa::Ca(depth);
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
    params
}
