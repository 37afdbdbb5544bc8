"""The works that the package implements: how a line of text refers to each, and its BibTeX."""

from __future__ import annotations

from typing import NamedTuple


class Paper(NamedTuple):
    """A work, as a line of text refers to it (authors and year, then the title) and as BibTeX."""

    reference: str
    bibtex: str


PAPERS: dict[str, Paper] = {
    "filtering": Paper(
        "Abdullaev, Tkachenko, Nguyen 2025, [Revisiting Transformers with Insights from Image Filtering and Boosting]"
        "(https://arxiv.org/abs/2506.10371)",
        """@article{abdullaev2025revisiting,
  title   = {Revisiting Transformers with Insights from Image Filtering and Boosting},
  author  = {Abdullaev, Laziz U. and Tkachenko, Maksim and Nguyen, Tan M.},
  journal = {arXiv preprint arXiv:2506.10371},
  year    = {2025}
}""",
    ),
    "twicing": Paper(
        "Abdullaev, Nguyen 2025, [Transformer Meets Twicing: Harnessing Unattended Residual Information]"
        "(https://arxiv.org/abs/2503.00687)",
        """@inproceedings{abdullaev2025twicing,
  title     = {Transformer Meets Twicing: Harnessing Unattended Residual Information},
  author    = {Abdullaev, Laziz U. and Nguyen, Tan M.},
  booktitle = {The Thirteenth International Conference on Learning Representations (ICLR)},
  year      = {2025},
  note      = {arXiv:2503.00687}
}""",
    ),
    "attention": Paper(
        "Vaswani et al. 2017, [Attention Is All You Need](https://arxiv.org/abs/1706.03762)",
        """@inproceedings{vaswani2017attention,
  title     = {Attention Is All You Need},
  author    = {Vaswani, Ashish and Shazeer, Noam and Parmar, Niki and Uszkoreit, Jakob and Jones, Llion and Gomez,
               Aidan N. and Kaiser, Lukasz and Polosukhin, Illia},
  booktitle = {Advances in Neural Information Processing Systems 30},
  year      = {2017},
  note      = {arXiv:1706.03762}
}""",
    ),
    "untied": Paper(
        "Ke, He, Liu 2021, [Rethinking Positional Encoding in Language Pre-training](https://arxiv.org/abs/2006.15595)",
        """@inproceedings{ke2021rethinking,
  title     = {Rethinking Positional Encoding in Language Pre-training},
  author    = {Ke, Guolin and He, Di and Liu, Tie-Yan},
  booktitle = {The Ninth International Conference on Learning Representations (ICLR)},
  year      = {2021},
  note      = {arXiv:2006.15595}
}""",
    ),
    "bilateral": Paper(
        "Tomasi, Manduchi 1998, Bilateral Filtering for Gray and Color Images",
        """@inproceedings{tomasi1998bilateral,
  title     = {Bilateral Filtering for Gray and Color Images},
  author    = {Tomasi, Carlo and Manduchi, Roberto},
  booktitle = {Sixth International Conference on Computer Vision (ICCV)},
  year      = {1998}
}""",
    ),
    "tukey": Paper(
        "Tukey 1977, Exploratory Data Analysis",
        """@book{tukey1977exploratory,
  title     = {Exploratory Data Analysis},
  author    = {Tukey, John W.},
  publisher = {Addison-Wesley},
  year      = {1977}
}""",
    ),
    "nlm": Paper(
        "Buades, Coll, Morel 2005, A Non-Local Algorithm for Image Denoising",
        """@inproceedings{buades2005nonlocal,
  title     = {A Non-Local Algorithm for Image Denoising},
  author    = {Buades, Antoni and Coll, Bartomeu and Morel, Jean-Michel},
  booktitle = {IEEE Computer Society Conference on Computer Vision and Pattern Recognition (CVPR)},
  year      = {2005}
}""",
    ),
    "elliptical": Paper(
        "Nielsen, Abdullaev, Teo, Nguyen 2024, [Elliptical Attention](https://arxiv.org/abs/2406.13770)",
        """@inproceedings{nielsen2024elliptical,
  title     = {Elliptical Attention},
  author    = {Nielsen, Stefan K. and Abdullaev, Laziz U. and Teo, Rachel S. Y. and Nguyen, Tan M.},
  booktitle = {Advances in Neural Information Processing Systems 37},
  year      = {2024},
  note      = {arXiv:2406.13770}
}""",
    ),
    "neutreno": Paper(
        "Nguyen, Nguyen, Baraniuk 2023, [Mitigating Over-smoothing in Transformers via Regularized "
        "Nonlocal Functionals]"
        "(https://arxiv.org/abs/2312.00751)",
        """@inproceedings{nguyen2023mitigating,
  title     = {Mitigating Over-smoothing in Transformers via Regularized Nonlocal Functionals},
  author    = {Nguyen, Tam and Nguyen, Tan M. and Baraniuk, Richard G.},
  booktitle = {Advances in Neural Information Processing Systems 36},
  year      = {2023},
  note      = {arXiv:2312.00751}
}""",
    ),
    "pidformer": Paper(
        "Nguyen, Uribe, Nguyen, Baraniuk 2024, [PIDformer: Transformer Meets Control Theory]"
        "(https://arxiv.org/abs/2402.15989)",
        r"""@inproceedings{nguyen2024pidformer,
  title     = {{PIDformer}: Transformer Meets Control Theory},
  author    = {Nguyen, Tam and Uribe, C{\'e}sar A. and Nguyen, Tan M. and Baraniuk, Richard G.},
  booktitle = {Proceedings of the 41st International Conference on Machine Learning (ICML)},
  pages     = {37776--37797},
  year      = {2024},
  note      = {arXiv:2402.15989}
}""",
    ),
    "alibi": Paper(
        "Press, Smith, Lewis 2021, [Train Short, Test Long: Attention with Linear Biases Enables Input "
        "Length Extrapolation]"
        "(https://arxiv.org/abs/2108.12409)",
        """@article{press2021train,
  title   = {Train Short, Test Long: Attention with Linear Biases Enables Input Length Extrapolation},
  author  = {Press, Ofir and Smith, Noah A. and Lewis, Mike},
  journal = {arXiv preprint arXiv:2108.12409},
  year    = {2021}
}""",
    ),
    "t5": Paper(
        "Raffel et al. 2019, [Exploring the Limits of Transfer Learning with a Unified Text-to-Text Transformer]"
        "(https://arxiv.org/abs/1910.10683)",
        """@article{raffel2019exploring,
  title   = {Exploring the Limits of Transfer Learning with a Unified Text-to-Text Transformer},
  author  = {Raffel, Colin and Shazeer, Noam and Roberts, Adam and Lee, Katherine and Narang, Sharan and Matena,
             Michael and Zhou, Yanqi and Li, Wei and Liu, Peter J.},
  journal = {arXiv preprint arXiv:1910.10683},
  year    = {2019}
}""",
    ),
    "roformer": Paper(
        "Su et al. 2021, [RoFormer: Enhanced Transformer with Rotary Position Embedding]"
        "(https://arxiv.org/abs/2104.09864)",
        """@article{su2021roformer,
  title   = {{RoFormer}: Enhanced Transformer with Rotary Position Embedding},
  author  = {Su, Jianlin and Lu, Yu and Pan, Shengfeng and Murtadha, Ahmed and Wen, Bo and Liu, Yunfeng},
  journal = {arXiv preprint arXiv:2104.09864},
  year    = {2021}
}""",
    ),
    "nope": Paper(
        "Haviv, Ram, Press, Izsak, Levy 2022, [Transformer Language Models without Positional Encodings "
        "Still Learn Positional Information]"
        "(https://arxiv.org/abs/2203.16634)",
        """@inproceedings{haviv2022transformer,
  title     = {Transformer Language Models without Positional Encodings Still Learn Positional Information},
  author    = {Haviv, Adi and Ram, Ori and Press, Ofir and Izsak, Peter and Levy, Omer},
  booktitle = {Findings of the Association for Computational Linguistics: EMNLP 2022},
  year      = {2022},
  note      = {arXiv:2203.16634}
}""",
    ),
    "sos": Paper(
        "Romano, Elad 2015, [Boosting of Image Denoising Algorithms](https://arxiv.org/abs/1502.06220)",
        """@article{romano2015boosting,
  title   = {Boosting of Image Denoising Algorithms},
  author  = {Romano, Yaniv and Elad, Michael},
  journal = {SIAM Journal on Imaging Sciences},
  volume  = {8},
  number  = {2},
  pages   = {1187--1219},
  year    = {2015},
  note    = {arXiv:1502.06220}
}""",
    ),
    "l2boosting": Paper(
        "Bühlmann, Yu 2003, Boosting with the L2 Loss: Regression and Classification",
        r"""@article{buhlmann2003boosting,
  title   = {Boosting with the {L2} Loss: Regression and Classification},
  author  = {B{\"u}hlmann, Peter and Yu, Bin},
  journal = {Journal of the American Statistical Association},
  volume  = {98},
  number  = {462},
  pages   = {324--339},
  year    = {2003}
}""",
    ),
    "inversion": Paper(
        "Chen, Gu, Fu 2025, [Frequency-Dynamic Attention Modulation for Dense Prediction]"
        "(https://arxiv.org/abs/2507.12006)",
        """@inproceedings{chen2025frequency,
  title     = {Frequency-Dynamic Attention Modulation for Dense Prediction},
  author    = {Chen, Linwei and Gu, Lin and Fu, Ying},
  booktitle = {IEEE/CVF International Conference on Computer Vision (ICCV)},
  year      = {2025},
  note      = {arXiv:2507.12006}
}""",
    ),
    "exclusive": Paper(
        "Zhai 2026, [Exclusive Self Attention](https://arxiv.org/abs/2603.09078)",
        """@article{zhai2026exclusive,
  title   = {Exclusive Self Attention},
  author  = {Zhai, Shuangfei},
  journal = {arXiv preprint arXiv:2603.09078},
  year    = {2026}
}""",
    ),
    "local_linear": Paper(
        "Zuo et al. 2026, [Parallax: Parameterized Local Linear Attention for Language Modeling]"
        "(https://arxiv.org/abs/2605.29157)",
        """@article{zuo2026parallax,
  title   = {Parallax: Parameterized Local Linear Attention for Language Modeling},
  author  = {Zuo, Yifei and Pai, Dhruv and Zeng, Zhichen and Dewulf, Alec and Hu, Shuming and Wang, Zhaoran},
  journal = {arXiv preprint arXiv:2605.29157},
  year    = {2026}
}""",
    ),
    "robust": Paper(
        "Hou et al. 2024, [ProTransformer: Robustify Transformers via Plug-and-Play Paradigm]"
        "(https://arxiv.org/abs/2410.23182)",
        """@inproceedings{hou2024protransformer,
  title     = {ProTransformer: Robustify Transformers via Plug-and-Play Paradigm},
  author    = {Hou, Zhichao and others},
  booktitle = {Advances in Neural Information Processing Systems},
  year      = {2024},
  note      = {arXiv:2410.23182}
}""",
    ),
    "takeda": Paper(
        "Takeda, Farsiu, Milanfar 2007, [Kernel Regression for Image Processing and Reconstruction]"
        "(https://doi.org/10.1109/TIP.2006.888330)",
        """@article{takeda2007kernel,
  title   = {Kernel Regression for Image Processing and Reconstruction},
  author  = {Takeda, Hiroyuki and Farsiu, Sina and Milanfar, Peyman},
  journal = {IEEE Transactions on Image Processing},
  volume  = {16},
  number  = {2},
  pages   = {349--366},
  year    = {2007}
}""",
    ),
    "gated": Paper(
        "Qiu et al. 2025, [Gated Attention for Large Language Models: Non-linearity, Sparsity, and "
        "Attention-Sink-Free](https://arxiv.org/abs/2505.06708)",
        """@article{qiu2025gated,
  title   = {Gated Attention for Large Language Models: Non-linearity, Sparsity, and Attention-Sink-Free},
  author  = {Qiu, Zihan and others},
  journal = {arXiv preprint arXiv:2505.06708},
  year    = {2025}
}""",
    ),
    "sink": Paper(
        "Miller 2023, [Attention Is Off By One](https://www.evanmiller.org/attention-is-off-by-one.html)",
        """@misc{miller2023attention,
  title  = {Attention Is Off By One},
  author = {Miller, Evan},
  year   = {2023},
  note   = {https://www.evanmiller.org/attention-is-off-by-one.html}
}""",
    ),
    "sigmoid": Paper(
        "Ramapuram et al. 2024, [Theory, Analysis, and Best Practices for Sigmoid Self-Attention]"
        "(https://arxiv.org/abs/2409.04431)",
        """@article{ramapuram2024theory,
  title   = {Theory, Analysis, and Best Practices for Sigmoid Self-Attention},
  author  = {Ramapuram, Jason and others},
  journal = {arXiv preprint arXiv:2409.04431},
  year    = {2024}
}""",
    ),
    "softpick": Paper(
        "Zuhri, Fuadi, Aji 2025, [Softpick: No Attention Sink, No Massive Activations with Rectified Softmax]"
        "(https://arxiv.org/abs/2504.20966)",
        """@article{zuhri2025softpick,
  title   = {Softpick: No Attention Sink, No Massive Activations with Rectified Softmax},
  author  = {Zuhri, Zayd M. K. and Fuadi, Erland Hilman and Aji, Alham Fikri},
  journal = {arXiv preprint arXiv:2504.20966},
  year    = {2025}
}""",
    ),
    "qk_norm": Paper(
        "Henry, Dachapally, Pawar, Chen 2020, [Query-Key Normalization for Transformers]"
        "(https://arxiv.org/abs/2010.04245)",
        """@inproceedings{henry2020query,
  title     = {Query-Key Normalization for Transformers},
  author    = {Henry, Alex and Dachapally, Prudhvi Raj and Pawar, Shubham Shantaram and Chen, Yuxuan},
  booktitle = {Findings of the Association for Computational Linguistics: EMNLP 2020},
  year      = {2020},
  note      = {arXiv:2010.04245}
}""",
    ),
    "value_residual": Paper(
        "Zhou et al. 2024, [Value Residual Learning](https://arxiv.org/abs/2410.17897)",
        """@article{zhou2024value,
  title   = {Value Residual Learning},
  author  = {Zhou, Zhanchao and others},
  journal = {arXiv preprint arXiv:2410.17897},
  year    = {2024}
}""",
    ),
    "sinkhorn": Paper(
        "Sander, Ablin, Blondel, Peyré 2022, [Sinkformers: Transformers with Doubly Stochastic Attention]"
        "(https://arxiv.org/abs/2110.11773)",
        """@inproceedings{sander2022sinkformers,
  title     = {Sinkformers: Transformers with Doubly Stochastic Attention},
  author    = {Sander, Michael E. and Ablin, Pierre and Blondel, Mathieu and Peyr{\'e}, Gabriel},
  booktitle = {International Conference on Artificial Intelligence and Statistics (AISTATS)},
  year      = {2022},
  note      = {arXiv:2110.11773}
}""",
    ),
    "symmetrizing": Paper(
        "Milanfar 2013, Symmetrizing Smoothing Filters",
        """@article{milanfar2013symmetrizing,
  title   = {Symmetrizing Smoothing Filters},
  author  = {Milanfar, Peyman},
  journal = {SIAM Journal on Imaging Sciences},
  volume  = {6},
  number  = {1},
  pages   = {263--284},
  year    = {2013}
}""",
    ),
    "forgetting": Paper(
        "Lin, Nikishin, He, Courville 2025, [Forgetting Transformer: Softmax Attention with a Forget Gate]"
        "(https://arxiv.org/abs/2503.02130)",
        """@inproceedings{lin2025forgetting,
  title     = {Forgetting Transformer: Softmax Attention with a Forget Gate},
  author    = {Lin, Zhixuan and Nikishin, Evgenii and He, Xu Owen and Courville, Aaron},
  booktitle = {The Thirteenth International Conference on Learning Representations (ICLR)},
  year      = {2025},
  note      = {arXiv:2503.02130}
}""",
    ),
    "differential": Paper(
        "Ye et al. 2025, [Differential Transformer](https://arxiv.org/abs/2410.05258)",
        """@inproceedings{ye2025differential,
  title     = {Differential Transformer},
  author    = {Ye, Tianzhu and others},
  booktitle = {The Thirteenth International Conference on Learning Representations (ICLR)},
  year      = {2025},
  note      = {arXiv:2410.05258}
}""",
    ),
    "delta": Paper(
        "Zhong, Xu, Ao, Shi 2025, [Understanding Transformer from the Perspective of Associative Memory]"
        "(https://arxiv.org/abs/2505.19488)",
        """@article{zhong2025understanding,
  title   = {Understanding Transformer from the Perspective of Associative Memory},
  author  = {Zhong, Shu and Xu, Mingyu and Ao, Tenglong and Shi, Guang},
  journal = {arXiv preprint arXiv:2505.19488},
  year    = {2025}
}""",
    ),
    "gradient_boosting": Paper(
        "Sargolzaei 2026, [Gradient Boosting within a Single Attention Layer](https://arxiv.org/abs/2604.03190)",
        """@article{sargolzaei2026gradient,
  title   = {Gradient Boosting within a Single Attention Layer},
  author  = {Sargolzaei, Saleh},
  journal = {arXiv preprint arXiv:2604.03190},
  year    = {2026}
}""",
    ),
}

PACKAGE_PAPERS = ("filtering", "twicing")
"""The two papers whose methods the package is about: cited by every card."""
